"""Configurations of a model folder: whatever is wrong in one is refused in a line that names the file."""

import inspect
import json
import os

import diffusers
import pytest

from tests.folders.tiny import WEIGHTS, linked_copy, put, refusal, set_values
from workbench.models import configs


@pytest.mark.parametrize("scheduler", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "FlowMatchHeunDiscreteScheduler",
                                       "EulerDiscreteScheduler", "LCMScheduler"])
def test_a_schedulers_own_defaults_are_valid(tmp_path, scheduler):
    cls = getattr(diffusers, scheduler)
    cls().save_config(tmp_path / "scheduler")
    configs.check_scheduler(tmp_path / "scheduler", cls)  # DPM-Solver's holds an infinite default


def test_the_defaults_of_every_class_of_diffusers_have_the_declared_types():
    names = [name for name in dir(diffusers) if name.endswith(("Model", "Scheduler")) or name.startswith("Autoencoder")]
    classes = [getattr(diffusers, name) for name in names]
    found = [cls for cls in classes if isinstance(cls, type) and issubclass(cls, diffusers.ConfigMixin) and not hasattr(cls, "_backends")]
    assert len(found) > 50
    for cls in found:
        defaults = {name: parameter.default for name, parameter in inspect.signature(cls.__init__).parameters.items()
                    if parameter.default is not parameter.empty and parameter.kind is not parameter.VAR_KEYWORD}
        configs.check_types(cls, json.loads(json.dumps(defaults, default=str)), cls.__name__)


@pytest.mark.parametrize(("file", "values", "words"), [
    ("transformer/config.json", {"num_layers": [1, 2]}, "num_layers is [1, 2]; an integer is needed"),
    ("transformer/config.json", {"num_layers": "19"}, 'num_layers is "19"; an integer is needed'),
    ("transformer/config.json", {"num_layers": True}, "num_layers is true; an integer"),
    ("transformer/config.json", {"num_layers": -1}, "holds transformer_blocks.0"),
    ("transformer/config.json", {"num_layers": 2}, "lacks transformer_blocks.1"),
    ("transformer/config.json", {"num_layers": 10**9}, "describes more than"),
    ("transformer/config.json", {"num_single_layers": 10**9}, "describes more than"),
    ("transformer/config.json", {"num_attention_heads": 10**9}, "transformer/config.json describes no model"),
    ("transformer/config.json", {"attention_head_dim": 2**62}, "transformer/config.json"),
    ("transformer/config.json", {"in_channels": 10**9}, "x_embedder.weight is (16, 16)"),
    ("transformer/config.json", {"in_channels": -16}, "transformer/config.json describes no model"),
    ("transformer/config.json", {"guidance_embeds": True}, "lacks time_text_embed.guidance_embedder"),
    ("transformer/config.json", {"axes_dims_rope": [2, 2, 2]}, "axes_dims_rope sum to 6; 8 is needed"),
    ("transformer/config.json", {"axes_dims_rope": [1, 3, 4]}, "three even numbers"),
    ("transformer/config.json", {"axes_dims_rope": 8}, "axes_dims_rope is 8; a list is needed"),
    ("transformer/config.json", {"axes_dims_rope": [2, 2, "4"]}, "a list is needed"),
    ("transformer/config.json", {"patch_size": 2}, "proj_out"),
    ("transformer/config.json", {"_class_name": "UNet2DModel"}, "is of UNet2DModel; model_index.json says FluxTransformer2DModel"),
    ("transformer/config.json", {"_class_name": ["a"]}, "is of ['a']"),
    ("transformer/config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}, "already quantized by bitsandbytes"),
    ("transformer/config.json", {"quantization_config": [1]}, "already quantized"),
    ("vae/config.json", {"sample_size": 10**9}, "sample_size is 1000000000; 16 to 8192"),
    ("vae/config.json", {"sample_size": [32, 32]}, "sample_size is [32, 32]; an integer"),
    ("vae/config.json", {"scaling_factor": float("nan")}, "scaling_factor is nan; a finite number"),
    ("vae/config.json", {"scaling_factor": 0}, "scaling_factor is 0"),
    ("vae/config.json", {"shift_factor": None}, "shift_factor is None"),
    ("vae/config.json", {"act_fn": "os.system"}, "vae/config.json describes no model"),
    ("vae/config.json", {"layers_per_block": 10**9}, "describes more than"),
    ("text_encoder/config.json", {"num_hidden_layers": "2"}, "text_encoder/config.json describes no model"),
    ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "describes more than"),
    ("text_encoder/config.json", {"vocab_size": 10**12}, "embeddings.token_embedding.weight is (3252, 8)"),
    ("text_encoder/config.json", {"max_position_embeddings": 10**12}, "embeddings.position_embedding.weight is (16, 8)"),
    ("text_encoder/config.json", {"quantization_config": {"quant_method": "torchao"}}, "already quantized by torchao"),
    ("text_encoder/config.json", {"transformers_weights": "../../x.safetensors"}, "transformers_weights names another file"),
    ("text_encoder/config.json", {"_attn_implementation": "someone/kernels"}, "names code to be downloaded"),
    ("text_encoder/config.json", {"eos_token_id": 7}, "eos_token_id is 7; the tokenizer ends a text with 3251"),
    ("text_encoder_2/config.json", {"d_ff": -8}, "text_encoder_2/config.json describes no model"),
    ("text_encoder_2/config.json", {"num_layers": 1}, "holds encoder.block.1"),
    ("tokenizer/tokenizer_config.json", {"model_max_length": "16"}, "model_max_length is 16; a number of tokens"),
    ("tokenizer/tokenizer_config.json", {"model_max_length": float("nan")}, "model_max_length is nan; a number of tokens"),
    ("tokenizer_2/tokenizer_config.json", {"model_max_length": float("inf")}, "model_max_length is inf; a number of tokens"),
    ("tokenizer/tokenizer_config.json", {"model_max_length": 10**30}, "text_encoder has 16 positions"),
    ("tokenizer_2/tokenizer_config.json", {"model_max_length": [16]}, "model_max_length is [16]"),
    ("tokenizer_2/tokenizer.json", {"model": {"type": "Unigram", "vocab": 5}}, "tokenizer_2 is no T5Tokenizer"),
    ("scheduler/scheduler_config.json", {"_class_name": "UniPCMultistepScheduler"}, "model_index.json says FlowMatch"),
    ("scheduler/scheduler_config.json", {"_class_name": ["x"]}, "model_index.json says FlowMatchEulerDiscreteScheduler"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": "1000"}, 'num_train_timesteps is "1000"; an integer'),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "num_train_timesteps is 1000000000; at most"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": -5}, "scheduler_config.json describes no"),
    ("scheduler/scheduler_config.json", {"shift": float("inf")}, "shift is inf; a finite number"),
    ("scheduler/scheduler_config.json", {"shift": [3.0]}, "shift is [3.0]; a number"),
    ("scheduler/scheduler_config.json", {"use_karras_sigmas": True, "use_beta_sigmas": True}, "describes no FlowMatch"),
    ("scheduler/scheduler_config.json", {"use_dynamic_shifting": 1}, "use_dynamic_shifting is 1; true or false"),
    ("model_index.json", {"transformer": "FluxTransformer2DModel"}, "[library, class] is needed"),
    ("model_index.json", {"transformer": ["diffusers"]}, "[library, class] is needed"),
    ("model_index.json", {"transformer": ["diffusers", ["FluxTransformer2DModel"]]}, "[library, class] is needed"),
    ("model_index.json", {"transformer": [None, None]}, "names no transformer, which FluxPipeline needs"),
    ("model_index.json", {"transformer": ["antigravity", "fly"]}, "transformer comes from antigravity; only diffusers and transformers"),
    ("model_index.json", {"extra": ["antigravity", "fly"]}, "extra comes from antigravity"),
    ("model_index.json", {"extra": ["diffusers", "AutoencoderKL"]}, "FluxPipeline has no part extra"),
    ("model_index.json", {"../vae": ["diffusers", "AutoencoderKL"]}, "no plain file or folder name"),
    ("model_index.json", {"transformer": ["diffusers", "pipelines"]}, "diffusers has no class pipelines"),
    ("model_index.json", {"transformer": ["diffusers", "NoSuchModel"]}, "diffusers has no class NoSuchModel"),
    ("model_index.json", {"transformer": ["diffusers", "AutoencoderKL"]}, "FluxPipeline needs a FluxTransformer2DModel"),
    ("model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, "FluxPipeline needs a CLIPTextModel"),
    ("model_index.json", {"tokenizer": ["transformers", "CLIPTextModel"]}, "tokenizer is a CLIPTextModel"),
    ("model_index.json", {"scheduler": ["diffusers", "AutoencoderKL"]}, "scheduler is a AutoencoderKL"),
    ("model_index.json", {"scheduler": ["diffusers", "UniPCMultistepScheduler"]}, "is of FlowMatchEulerDiscreteScheduler"),
    ("model_index.json", {"_class_name": ["pipeline", "FluxPipeline"]}, "the name of a pipeline's class is needed"),
    ("model_index.json", {"_class_name": None}, "the name of a pipeline's class is needed"),
    ("model_index.json", {"_class_name": "Flux\nPipeline" * 100}, "supported are FluxPipeline"),
])
def test_a_wrong_configuration_is_named(model, file, values, words):
    set_values(model / file, **values)
    assert words in refusal(model)


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json", "vae/config.json", "text_encoder/config.json",
                                  "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"])
@pytest.mark.parametrize("content", [[], "x", 5, None, b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000])
def test_a_json_file_that_is_no_object_is_named(model, file, content):
    put(model / file, content)
    assert file in refusal(model)


@pytest.mark.parametrize("file", ["transformer/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json", WEIGHTS["vae"]])
def test_a_missing_file_a_dangling_link_a_pipe_and_a_folder_are_named(model, file):
    part = file.partition("/")[0]
    (model / file).unlink()
    assert part in refusal(model)
    (model / file).symlink_to("nowhere")
    assert part in refusal(model)
    (model / file).unlink()
    os.mkfifo(model / file)  # opening it would wait for ever
    assert part in refusal(model)
    (model / file).unlink()
    (model / file).mkdir()
    assert part in refusal(model)


def test_a_part_without_its_folder_is_not_looked_for_elsewhere(model):
    for path in (model / "vae").iterdir():
        os.rename(path, model / path.name)
    (model / "vae").rmdir()
    assert "vae is missing, which model_index.json names" in refusal(model)


def test_adapters_and_exports_are_told_apart(model):
    put(model / "text_encoder/adapter_config.json", {"base_model_name_or_path": "/"})
    assert "adapter" in refusal(model)
    (model / "text_encoder/adapter_config.json").unlink()
    put(model / "transformer/layers.json", {})
    assert "exported checkpoint" in refusal(model)


def test_parts_of_two_models_are_told(model):
    for name in ("tokenizer", "tokenizer_2"):
        os.rename(model / name, model / f"{name}.was")
    linked_copy(model / "tokenizer.was", model / "tokenizer_2")
    linked_copy(model / "tokenizer.was", model / "tokenizer")
    set_values(model / "model_index.json", tokenizer_2=["transformers", "CLIPTokenizer"])
    assert "tokenizer_2 has 3,252 tokens, text_encoder_2 embeds 1,410" in refusal(model)
