"""LlamaConfig: published counts, an independent parameter count, both file formats, refusals."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM

from llama_edu import LlamaConfig, RopeScaling
from llama_edu.config import ffn_width, forward_flops_per_token, parameter_counts

NAMES = LlamaConfig.preset_names()


@pytest.mark.parametrize("name", NAMES)
def test_parameters_equal_those_of_transformers(name):
    cfg = LlamaConfig.preset(name)
    with torch.device("meta"):
        model = LlamaForCausalLM(HFConfig(**cfg.to_hf()))
    assert cfg.num_parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_and_writes_the_same_configuration(name):
    cfg = LlamaConfig.preset(name)
    assert LlamaConfig.from_hf(HFConfig(**cfg.to_hf()).to_dict()) == cfg


@pytest.mark.parametrize("name", NAMES)
def test_meta_params_round_trip(name):
    cfg = LlamaConfig.preset(name)
    back = LlamaConfig.from_meta(cfg.to_meta(), max_seq_len=cfg.max_seq_len, tie_embeddings=cfg.tie_embeddings)
    assert back == cfg


def test_published_params_json_of_three_generations():
    llama1 = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06, "vocab_size": -1}
    assert LlamaConfig.from_meta(llama1, vocab_size=32_000, max_seq_len=2048) == LlamaConfig.preset("llama-1-7b")
    llama3 = {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "multiple_of": 1024,
        "ffn_dim_multiplier": 1.3,
        "norm_eps": 1e-05,
        "rope_theta": 500000.0,
    }
    assert LlamaConfig.from_meta(llama3) == LlamaConfig.preset("llama-3-8b")
    assert LlamaConfig.from_meta({**llama3, "use_scaled_rope": True}) == LlamaConfig.preset("llama-3.1-8b")


def test_meta_without_a_vocabulary_asks_for_it():
    with pytest.raises(ValueError, match="pass vocab_size="):
        LlamaConfig.from_meta({"dim": 64, "n_layers": 1, "n_heads": 4, "vocab_size": -1})


configs = st.builds(
    lambda heads, groups, head_dim, layers, vocab, ffn, theta, scaled, tied: LlamaConfig(
        dim=heads * groups * head_dim,
        n_layers=layers,
        n_heads=heads * groups,
        n_kv_heads=heads,
        vocab_size=vocab,
        ffn_dim=ffn,
        rope_theta=theta,
        rope_scaling=RopeScaling(16.0) if scaled else None,
        tie_embeddings=tied,
    ),
    st.integers(1, 8),
    st.integers(1, 4),
    st.sampled_from([2, 8, 64, 128]),
    st.integers(1, 5),
    st.integers(1, 200_000),
    st.integers(1, 9000),
    st.sampled_from([1e4, 5e5]),
    st.booleans(),
    st.booleans(),
)


@given(configs)
@settings(deadline=None)
def test_any_configuration_survives_both_formats_and_a_dict(cfg):
    assert LlamaConfig.from_hf(cfg.to_hf()) == cfg
    assert LlamaConfig.from_dict(cfg.to_dict()) == cfg
    back = LlamaConfig.from_meta(cfg.to_meta(), max_seq_len=cfg.max_seq_len, tie_embeddings=cfg.tie_embeddings)
    assert back == cfg


@given(configs)
@settings(deadline=None, max_examples=20)
def test_components_add_up(cfg):
    assert sum(parameter_counts(cfg).values()) == cfg.num_parameters()


def test_flops_equal_the_counter_of_torch_on_the_reference_model():
    cfg = LlamaConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=300, ffn_dim=160)
    model = LlamaForCausalLM(HFConfig(**cfg.to_hf(), attn_implementation="eager"))
    seq = 32
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, seq, dtype=torch.long))
    # The eager reference computes the whole square of scores, of which causality needs (seq + 1) / 2 a row.
    square = 4 * cfg.n_layers * cfg.n_heads * cfg.head_dim * (seq - (seq + 1) / 2)
    assert counter.get_total_flops() == seq * (forward_flops_per_token(cfg, seq) + square)


@pytest.mark.parametrize("dim, width", [(4096, 11008), (5120, 13824), (6656, 17920), (8192, 22016)])
def test_llama_1_widths_follow_from_the_rule(dim, width):
    assert ffn_width(dim) == width


@pytest.mark.parametrize(
    "change, words",
    [
        ({"n_heads": 3}, "does not divide by n_heads 3"),
        ({"n_kv_heads": 3}, "does not divide by n_kv_heads 3"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"head_dim": 7}, "must be even"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"dim": 0}, "dim is 0"),
        ({"norm_eps": True}, "norm_eps is True; it must be a finite number"),
        ({"norm_eps": float("inf")}, "norm_eps is inf; it must be a finite number"),
    ],
)
def test_impossible_shapes_are_refused_with_the_value(change, words):
    with pytest.raises(ValueError, match=words):
        LlamaConfig(**{"dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 256, **change})


SCALING = LlamaConfig.preset("llama-3.2-1b").to_hf()["rope_scaling"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "mistral"}, "model_type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "'linear'"),
        (
            {"rope_parameters": {"rope_type": "default"}},
            "rope_parameters of type 'default' and rope_scaling of type 'lla",
        ),
        ({"rope_scaling": {**SCALING, "original_max_position_embeddings": 0}}, "original_max_seq_len is 0"),
        ({"rope_scaling": {**SCALING, "factor": float("inf")}}, "factor is inf; it must be a finite number"),
        ({"quantization_config": {"quant_method": "fp8"}}, "has a quantization_config; only plain"),
    ],
)
def test_what_is_no_llama_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        LlamaConfig.from_hf({**LlamaConfig.preset("llama-3.2-1b").to_hf(), **change})


def test_unknown_names_are_refused_with_the_choice():
    with pytest.raises(ValueError, match=r"llama-3\.1-8b"):
        LlamaConfig.preset("llama-9-1b")
    with pytest.raises(ValueError, match="unknown fields in a model configuration: wings"):
        LlamaConfig.from_dict({"wings": 2})


def test_published_memory_of_the_cache():
    gib = lambda name: LlamaConfig.preset(name).kv_cache_bytes(LlamaConfig.preset(name).max_seq_len) / 2**30
    assert [gib(n) for n in ("llama-3.2-1b", "llama-3.1-8b", "llama-3.1-405b", "llama-1-7b")] == [4.0, 16.0, 63.0, 1.0]
    eight = LlamaConfig.preset("llama-3-8b")
    assert eight.kv_cache_bytes(10, batch_size=3, dtype=torch.float32) == 6 * eight.kv_cache_bytes(10)


def test_metas_file_holds_what_its_generation_knows():
    """Its loaders hand every key to a dataclass: Llama 1's and 2's know no rope_theta, Llama 1's no n_kv_heads."""
    old = {"dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "norm_eps"}
    keys = {name: set(LlamaConfig.preset(name).to_meta()) for name in ("llama-1-7b", "llama-2-7b", "llama-2-70b")}
    assert keys["llama-1-7b"] == keys["llama-2-7b"] == old
    assert keys["llama-2-70b"] == old | {"n_kv_heads", "ffn_dim_multiplier"}
    assert {"n_kv_heads", "rope_theta"} <= set(LlamaConfig.preset("llama-3-8b").to_meta())
    with pytest.raises(ValueError, match="use_scaled_rope = 'no'; it must be true or false"):
        LlamaConfig.from_meta({**LlamaConfig.preset("llama-3-8b").to_meta(), "use_scaled_rope": "no"})


def test_values_of_another_kind_are_refused_in_a_sentence():
    """JSON has any type anywhere. In a process of its own: the checks of annotations here would come first."""
    code = """
from llama_edu import LlamaConfig
from llama_edu.errors import UserError
good = LlamaConfig.preset("llama-3.2-1b").to_hf()
scaling = good["rope_scaling"]
bad = {
    "rms_norm_eps": ("1e-5", None, [1e-5], True, float("inf"), float("nan")),
    "tie_word_embeddings": ("no", 1, None),
    "hidden_size": ("2048", 2048.0, None, [2048]),
    "rope_scaling": [{**scaling, "original_max_position_embeddings": v} for v in ("8192", None, 8192.5, [8192])]
    + [{**scaling, "factor": None}, {"rope_type": "llama3"}, {"rope_type": ["llama3"]}, "llama3"],
    "rope_theta": (None, "x"),
    "rope_parameters": ([1],),
}
for key, values in bad.items():
    for value in values:
        try:
            LlamaConfig.from_hf({**good, key: value})
        except UserError as error:
            print(error)
        else:
            raise SystemExit(f"{key} = {value!r} was taken")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    assert len(done.stdout.splitlines()) == 24


def test_what_a_file_lacks_is_named():
    for read, said in ((LlamaConfig.from_hf, "config.json"), (LlamaConfig.from_meta, "params.json")):
        with pytest.raises(ValueError, match=f"{said} lacks the key '(n_layers|num_hidden_layers)'"):
            read({"hidden_size": 64, "dim": 64, "vocab_size": 9})
