"""Which files of a repository are downloaded; names, and the table of models."""

from __future__ import annotations

import pytest

from dllama_mpi.errors import ModelError
from dllama_mpi.hub.choice import Choice, RepoFile, choose, quantisation_of
from dllama_mpi.hub.names import Name, models, parse_name, table_names
from dllama_mpi.kernels.layout import FORMATS
from dllama_mpi.model.recipe import parameters
from dllama_mpi.model.tensors import Kind, tensors
from dllama_mpi.planning.fit import Fitting, config_of, formats_of


def chosen(paths: list[str], what: str | None = None) -> Choice:
    """Return the choice among files of a million bytes each."""
    return choose("org/x", [RepoFile(path, 1_000_000) for path in paths], what, list)


def refused(paths: list[str], what: str | None = None) -> str:
    """Return why nothing is chosen."""
    with pytest.raises(ModelError) as caught:
        chosen(paths, what)
    return str(caught.value)


def test_small_files_come_first_and_nothing_twice() -> None:
    small = ["chat_template.jinja", "config.json", "generation_config.json", "merges.txt", "tokenizer.json"]
    other = ["README.md", "original/consolidated.00.pth", "consolidated.safetensors", "pytorch_model.bin", "model.onnx"]
    other += ["pytorch_model.bin.index.json", "x-Q4_K_M.gguf", "sub/config.json", ".gitattributes"]
    found = chosen([*other, "model.safetensors", *small])
    assert [file.path for file in found.files] == [*small, "model.safetensors"]
    assert (found.model, found.what, found.size) == ("", None, 6_000_000)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("Llama-3.2-1B-Instruct-Q4_K_M.gguf", "Q4_K_M"),
        ("qwen2.5-0.5b-instruct-q4_k_m.gguf", "Q4_K_M"),
        ("tinyllama-1.1b-chat-v1.0.Q4_0.gguf", "Q4_0"),
        ("Q8_0/big-Q8_0-00001-of-00002.gguf", "Q8_0"),
        ("m-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("m-IQ4_NL.gguf", "IQ4_NL"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("m-BF16.gguf", "BF16"),
        ("ggml-model.gguf", None),
    ],
)
def test_a_quantisation_is_read_from_the_name(path: str, expected: str | None) -> None:
    assert quantisation_of(path) == expected


def test_one_gguf_of_many() -> None:
    parts = [f"Q8_0/m-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    many = ["m-Q4_K_M.gguf", "m-UD-Q4_K_XL.gguf", "mmproj-F16.gguf", "m.imatrix.gguf", "README.md", *parts]
    assert chosen(many) == Choice((RepoFile("m-Q4_K_M.gguf", 1_000_000),), "m-Q4_K_M.gguf", "Q4_K_M")
    assert [file.path for file in chosen(many, "q8_0").files] == parts
    assert chosen(many, "Q8_0").model == parts[0]
    assert chosen(many, "Q4_K_XL").model == "m-UD-Q4_K_XL.gguf"
    assert chosen(many, "m-q4_k_m.GGUF").model == "m-Q4_K_M.gguf"
    assert chosen(many, "m-Q8_0-00002-of-00003.gguf").model == parts[0]
    assert refused(many, "Q4_K_S") == (
        "org/x has no Q4_K_S (nearest: Q4_K_M); choose one: Q4_K_M (1.0 MB), UD-Q4_K_XL (1.0 MB), Q8_0 (3.0 MB)"
    )
    assert "is of a set of 3 files, and 2 are there" in refused(parts[:2])
    assert chosen(["model.gguf"]).model == "model.gguf"
    assert "no single Q4_K_M file; choose one: a-Q8_0.gguf (1.0 MB), b-Q8_0.gguf" in refused(
        ["a-Q8_0.gguf", "b-Q8_0.gguf"]
    )
    assert "several files for Q8_0; choose one: a-Q8_0.gguf" in refused(["a-Q8_0.gguf", "b-Q8_0.gguf"], "Q8_0")


def test_a_folder_and_a_gguf_side_by_side() -> None:
    both = ["config.json", "model.safetensors", "m-Q4_K_M.gguf"]
    assert chosen(both).model == ""
    assert chosen(both, "Q4_K_M").model == "m-Q4_K_M.gguf"


def test_what_distributed_llama_publishes() -> None:
    found = chosen(["README.md", "dllama_tokenizer_x.t", "dllama_model_x_q40.m"])
    assert (found.model, found.files[0].path) == ("dllama_model_x_q40.m", "dllama_tokenizer_x.t")
    assert "in pieces" in refused(["dllama_model_x_q40aa", "dllama_model_x_q40ab", "dllama_tokenizer_x.t"])


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "an adapter"),
        (["config.json", "pytorch_model.bin"], "PyTorch pickles alone"),
        (["model.onnx"], "ONNX alone"),
        (["config.json", "diffusion.safetensors"], "no model.safetensors"),
        (["README.md"], "no model: neither"),
        (["model.safetensors"], "no config.json"),
    ],
)
def test_what_cannot_be_run_is_named(paths: list[str], expected: str) -> None:
    assert expected in refused(paths)


def test_an_index_may_not_name_what_is_not_there() -> None:
    files = [RepoFile("config.json"), RepoFile("model.safetensors.index.json")]
    with pytest.raises(ModelError, match=r"names a\.safetensors, which is not there"):
        choose("org/x", files, None, lambda: ["a.safetensors"])


# ---- names


def test_names() -> None:
    assert parse_name("Qwen/Qwen3-8B") == Name("Qwen/Qwen3-8B")
    assert parse_name("org/x:Q4_K_M") == Name("org/x", "Q4_K_M")
    assert parse_name("org/x:sub/y.gguf") == Name("org/x", "sub/y.gguf")
    for path in ("./a/b", "../b", "/a/b", "~/b", "a/b/c", "a", "org/x:", "", "org/", "a b/c"):
        assert parse_name(path) is None, path


def test_names_of_the_table() -> None:
    gguf = models()["llama3.2-1b"].gguf
    for name in ("llama3.2-1b", "llama3_2_1b_instruct_q40", "llama3-2-1b-instruct-q40", "Llama3.2-1B"):
        assert parse_name(name) == Name(gguf, "Q4_K_M"), name
    assert parse_name("llama3.2-1b:Q8_0") == Name(gguf, "Q8_0")
    assert parse_name("llama3.2-1b:safetensors") == Name("meta-llama/Llama-3.2-1B-Instruct")
    assert parse_name("gpt-oss-20b") == Name("openai/gpt-oss-20b")


def test_distributed_llamas_names_are_in_the_table() -> None:
    names = """llama3_1_8b_instruct_q40 llama3_1_405b_instruct_q40 llama3_2_1b_instruct_q40 llama3_2_3b_instruct_q40
    llama3_3_70b_instruct_q40 deepseek_r1_distill_llama_8b_q40 qwen3_0.6b_q40 qwen3_1.7b_q40 qwen3_8b_q40 qwen3_14b_q40
    qwen3_30b_a3b_q40"""
    assert set(names.split()) <= set(table_names())
    assert len(table_names()) == sum(1 + len(model.aliases) for model in models().values())


# ---- sizes, and where they fit


def published_bytes(name: str) -> float:
    """Return the bytes that a model's download should have: Q4_K is 4.5 bits a weight, Q6_K 6.56, BF16 16."""
    model = models()[name]
    config = config_of(model)
    if not model.gguf:
        return 2.0 * parameters(config)
    formats, total = formats_of(model, config), 0.0
    for spec in tensors(config):
        if spec.kind is Kind.TABLE:
            total += 0 if config.tie_word_embeddings else spec.size * 4.5 / 8
        elif spec.kind is Kind.MATRIX:
            total += spec.size * (6.5625 if formats[spec.name] is FORMATS["q80"] else 4.5) / 8
        else:
            total += 4 * spec.size
    return total


@pytest.mark.parametrize("name", [name for name in models() if name != "gpt-oss-20b"])
def test_shapes_and_sizes_of_the_table_agree(name: str) -> None:
    """A shape that is not the model's would give another size: they were taken down independently."""
    assert published_bytes(name) == pytest.approx(1e9 * models()[name].gigabytes, rel=0.03)


def test_more_hosts_hold_more() -> None:
    fitting = Fitting.of(models()["qwen3-8b"])
    one, two = fitting.on(1, int(8e9)), fitting.on(2, int(8e9))
    assert one is not None
    assert two is not None
    assert 5e9 < one.needed < 7e9
    assert two.needed < 0.6 * one.needed
    assert fitting.on(1, int(4e9)) is not None
    least = fitting.least(int(4e9))
    assert least is not None
    assert least.ranks == 2
    assert fitting.least(int(5e7)) is None
    assert fitting.on(fitting.most + 1, int(8e9)) is None
