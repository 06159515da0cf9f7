"""The tiny tokenizers of tests do what the pipelines ask of the real ones."""

import transformers

from tests.models.text import qwen2_tokenizer, qwen3_config

TURN = [{"role": "user", "content": "a red fox, 狐"}]


def templated(tokenizer, messages=TURN, **options):
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)


def test_the_chat_template_thinks_unless_told_not_to():
    tokenizer = qwen2_tokenizer()
    thinking, short = (templated(tokenizer, enable_thinking=on) for on in (True, False))
    assert thinking == "<|im_start|>user\na red fox, 狐<|im_end|>\n<|im_start|>assistant\n"
    assert short == thinking + "<think>\n\n</think>\n\n"
    parts = [{"role": "user", "content": [{"type": "text", "text": TURN[0]["content"]}]}]
    assert templated(tokenizer, parts) == thinking


def test_text_comes_back_and_special_tokens_are_one_id_each():
    tokenizer = qwen2_tokenizer()
    ids = tokenizer(templated(tokenizer)).input_ids
    assert tokenizer.decode(ids) == templated(tokenizer) and max(ids) < len(tokenizer)
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>") and ids.count(tokenizer.eos_token_id) == 1
    assert len(tokenizer(" red fox").input_ids) == 2  # merged
    padded = tokenizer(["red", "a red fox"], padding="max_length", max_length=4, truncation=True)
    assert padded.attention_mask == [[1, 0, 0, 0], [1, 1, 1, 0]]
    assert padded.input_ids[0][1:] == [tokenizer.pad_token_id] * 3


def test_ids_and_template_survive_saving(tmp_path):
    tokenizer = qwen2_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for cls in (transformers.Qwen2Tokenizer, transformers.AutoTokenizer):
        loaded = cls.from_pretrained(tmp_path)
        assert templated(loaded) == templated(tokenizer) and len(loaded) == len(tokenizer)
        assert loaded(templated(loaded)).input_ids == tokenizer(templated(tokenizer)).input_ids
        assert (loaded.model_max_length, loaded.eos_token_id, loaded.pad_token_id) == (512, tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_a_tiny_qwen3_embeds_the_vocabulary():
    tokenizer = qwen2_tokenizer()
    model = transformers.Qwen3Model(qwen3_config(tokenizer)).eval()
    found = model(**tokenizer([templated(tokenizer)], return_tensors="pt"), output_hidden_states=True)
    assert found.hidden_states[-2].shape[-1] == 16 and len(found.hidden_states) == 3
