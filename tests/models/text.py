"""Tiny tokenizers and text encoders of the real classes, made from nothing, for pipelines that tests assemble."""

import transformers
from tokenizers.pre_tokenizers import ByteLevel

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
MERGES = (("r", "e"), ("re", "d"), ("Ġ", "a"), ("Ġ", "red"), ("o", "x"), ("Ġ", "f"), ("Ġf", "ox"))
# As published for Qwen3: a turn of each message; the empty thought only where thinking is turned off.
CHAT_TEMPLATE = """
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.content is string %}{{- message.content }}
{%- else %}{%- for part in message.content %}{{- part.text }}{%- endfor %}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""


def qwen2_tokenizer(model_max_length: int = 512) -> transformers.Qwen2Tokenizer:
    """Every byte is a token, a few words are shorter, and special tokens come last."""
    words = [*sorted(ByteLevel.alphabet()), *(left + right for left, right in MERGES)]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=list(MERGES), eos_token="<|im_end|>",
        pad_token="<|endoftext|>", model_max_length=model_max_length, extra_special_tokens=list(SPECIAL))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def qwen3_config(tokenizer, width: int = 16, layers: int = 2) -> transformers.Qwen3Config:
    """Of a Qwen3 model that embeds exactly the tokenizer's vocabulary."""
    return transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=width // 2, max_position_embeddings=tokenizer.model_max_length, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
