"""Tokenizers of every origin, and where their files are looked for."""

import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from pipeline.errors import UserError
from pipeline.tasks.visobert.config import EMBEDDED
from pipeline.tasks.visobert.encoders.model_folder import SMALL_CONFIG, model_folder
from pipeline.tasks.visobert.tokenizer import (
    EmbeddedTokenizer,
    load_saved,
    load_tokenizer,
    unknown_share,
)

pytestmark = pytest.mark.xdist_group("review model")  # of whose process transformers is imported

TEXTS = [
    "Pin trâu, máy đẹp lắm nhé!",
    "Máy ĐẸP quá nhưng pin tụt nhanh 100%",
    "Camera mờ, shop tư vấn ko nhiệt tình :((",
    "giao hàng nhanh, đóng gói cẩn thận",
]
PIECES = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # ids 0 to 4, as in XLM-R
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def trained(kind: str, normalizer: Any = None, pre_tokenizer: Any = None) -> Backend:
    """A tokenizer of the library alone: byte-pair encoding like ViSoBERT's, or WordPiece."""
    if kind == "bpe":
        backend, trainer = Backend(models.BPE(unk_token="<unk>")), trainers.BpeTrainer  # noqa: S106
        special, (start, end) = PIECES, ("<s>", "</s>")
        backend.decoder = decoders.Metaspace()
    else:
        backend, trainer = Backend(models.WordPiece(unk_token="[UNK]")), trainers.WordPieceTrainer  # noqa: S106
        special, (start, end) = WORDS, ("[CLS]", "[SEP]")
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.Metaspace()
    options: dict[str, Any] = {"vocab_size": 160, "special_tokens": list(special), "show_progress": False}
    backend.train_from_iterator(TEXTS * 5, trainer(**options))
    ids = [(token, backend.token_to_id(token)) for token in (start, end)]
    backend.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=ids)
    return backend


def folder_of(folder: Path, backend: Backend, model_type: str, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def own_ids(file: Path, text: str) -> list[int]:
    """What the file itself says, by the library that wrote it, without truncation and padding."""
    backend = Backend.from_file(str(file))
    backend.no_truncation()
    backend.no_padding()
    ids: list[int] = backend.encode(unicodedata.normalize("NFC", text)).ids
    return ids


def ids_of(tokenizer: Any, texts: list[str], max_tokens: int | None = None) -> list[list[int]]:
    tokens = tokenizer.encode(texts, max_tokens)
    assert int(tokens.lengths.sum()) == len(tokens.ids)
    assert (tokens.ids.dtype.name, tokens.lengths.dtype.name) == ("int32", "int64")
    ids, start = [], 0
    for length in tokens.lengths.tolist():
        ids.append(tokens.ids[start : start + length].tolist())
        start += length
    return ids


XLMR = {
    "tokenizer_class": "XLMRobertaTokenizer",
    "model_max_length": 6,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": {"content": "<mask>", "__type": "AddedToken"},
}


@pytest.fixture
def visobert(tmp_path: Path) -> Path:
    """As ViSoBERT comes: byte-pair encoding, a class that would be Unigram, truncation and padding baked in."""
    backend = trained("bpe", normalizers.NFKC())
    backend.enable_truncation(6)
    backend.enable_padding(pad_id=1, pad_token="<pad>", length=6)  # noqa: S106
    return folder_of(tmp_path / "visobert", backend, "xlm-roberta", XLMR)


def test_a_class_that_does_not_fit_its_file(visobert: Path) -> None:
    tokenizer = load_tokenizer(str(visobert), None, [], 0)
    expected = [own_ids(visobert / "tokenizer.json", text) for text in TEXTS]
    assert ids_of(tokenizer, TEXTS) == expected
    assert max(map(len, expected)) > 6  # neither cut nor padded, though the file says so
    assert len(Backend.from_file(str(visobert / "tokenizer.json")).encode(TEXTS[0]).ids) == 6
    assert (tokenizer.pad_id, tokenizer.mask_id) == (1, 4)
    assert tokenizer.size == Backend.from_file(str(visobert / "tokenizer.json")).get_vocab_size()


def test_longer_texts_are_cut_with_their_last_token_kept(visobert: Path) -> None:
    tokenizer = load_tokenizer(str(visobert), None, [], 0)
    for text, ids in zip(TEXTS, ids_of(tokenizer, TEXTS, 5), strict=True):
        whole = own_ids(visobert / "tokenizer.json", text)
        assert ids == [*whole[:4], whole[-1]]
    assert ids_of(tokenizer, TEXTS)[0] == own_ids(visobert / "tokenizer.json", TEXTS[0])  # cutting leaves no trace


@pytest.mark.parametrize(
    ("kind", "model_type", "config", "cutting"),
    [
        ("bpe", "roberta", {"tokenizer_class": "RobertaTokenizer", "pad_token": "<pad>"}, ()),
        ("bpe", "roberta", None, ()),
        ("bpe", "roberta", {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}, ()),
        ("bpe", "roberta", {"tokenizer_class": "PhobertTokenizer"}, ()),
        ("wordpiece", "bert", {"tokenizer_class": "BertTokenizer"},
         (normalizers.BertNormalizer(lowercase=False, strip_accents=False), pre_tokenizers.BertPreTokenizer())),
        ("wordpiece", "bert", None,
         (normalizers.BertNormalizer(lowercase=False, strip_accents=False), pre_tokenizers.BertPreTokenizer())),
        ("wordpiece", "electra", {"do_lower_case": True},
         (normalizers.BertNormalizer(lowercase=True, strip_accents=False), pre_tokenizers.BertPreTokenizer())),
        ("wordpiece", "distilbert", {}, (normalizers.Lowercase(), pre_tokenizers.Whitespace())),
    ],
)  # fmt: skip
def test_a_tokenizer_file_gives_its_own_ids(
    tmp_path: Path, kind: str, model_type: str, config: dict[str, Any] | None, cutting: tuple[Any, ...]
) -> None:
    """Whatever class the folder names: a cased Vietnamese vocabulary must not lose its capitals and tones."""
    folder = folder_of(tmp_path / "model", trained(kind, *cutting), model_type, config)
    expected = [own_ids(folder / "tokenizer.json", text) for text in TEXTS]
    assert ids_of(load_tokenizer(str(folder), None, [], 0), TEXTS) == expected


def test_decomposed_letters_are_composed_first(tmp_path: Path) -> None:
    """The tokenizer itself does not: its vocabulary has composed letters alone."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
    folder = folder_of(tmp_path / "model", trained("bpe"), "roberta", config)
    decomposed = [unicodedata.normalize("NFD", text) for text in TEXTS]
    assert decomposed != TEXTS
    expected = [own_ids(folder / "tokenizer.json", text) for text in TEXTS]
    assert ids_of(load_tokenizer(str(folder), None, [], 0), decomposed) == expected


def test_a_pretrained_tokenizer_gets_the_text_as_it_is(visobert: Path) -> None:
    tokenizer = load_tokenizer(str(visobert), None, [], 0)
    texts = ["hoà &lt;3", "hòa &lt;3"]
    assert ids_of(tokenizer, texts) == [own_ids(visobert / "tokenizer.json", text) for text in texts]


def test_the_embedded_tokenizer_reads_every_spelling_alike() -> None:
    tokenizer = load_tokenizer(EMBEDDED, None, [*TEXTS, "hòa bình, thủy chung, khỏe re"] * 3, 300)
    spellings = ["Hòa bình, khỏe", "Hoà b&igrave;nh, khoẻ", unicodedata.normalize("NFD", "Hoà bình, khoẻ")]
    first, *others = ids_of(tokenizer, spellings)
    assert others == [first, first]
    assert tokenizer.unknown_id not in first
    trained_on_others = load_tokenizer(EMBEDDED, None, [*TEXTS, "hoà bình, thuỷ chung, khoẻ re"] * 3, 300)
    assert ids_of(trained_on_others, spellings) == [first] * 3


# ---------------------------------------------------------------- word segmentation

SEGMENTED = {"Điện thoại tốt": "Điện_thoại tốt", "nhân viên nhiệt tình": "nhân_viên nhiệt_tình"}


@pytest.fixture
def pyvi(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, which knows two texts."""
    module = ModuleType("pyvi.ViTokenizer")
    module.tokenize = SEGMENTED.__getitem__  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyvi", ModuleType("pyvi"))
    monkeypatch.setitem(sys.modules, "pyvi.ViTokenizer", module)


@pytest.mark.usefixtures("pyvi")
def test_texts_are_segmented_before_they_are_tokenised(visobert: Path, tmp_path: Path) -> None:
    plain = load_tokenizer(str(visobert), None, [], 0)
    tokenizer = load_tokenizer(str(visobert), None, [], 0, "pyvi")
    texts = [unicodedata.normalize("NFD", text) for text in SEGMENTED]
    expected = ids_of(plain, list(SEGMENTED.values()))
    assert ids_of(tokenizer, texts) == expected != ids_of(plain, texts)
    assert ids_of(tokenizer, texts, 5) == ids_of(plain, list(SEGMENTED.values()), 5)
    assert tokenizer.digest != plain.digest  # cached tokens are not shared
    assert (tokenizer.size, tokenizer.pad_id, tokenizer.mask_id, tokenizer.unknown_id) == (
        plain.size, plain.pad_id, plain.mask_id, plain.unknown_id
    )  # fmt: skip
    tokenizer.save(tmp_path / "saved")
    assert ids_of(load_saved(tmp_path / "saved", str(visobert), "pyvi"), texts) == expected


@pytest.mark.usefixtures("pyvi")
def test_the_embedded_tokenizer_is_trained_on_segmented_texts() -> None:
    segmented = load_tokenizer(EMBEDDED, None, list(SEGMENTED.values()) * 3, 300)
    tokenizer = load_tokenizer(EMBEDDED, None, list(SEGMENTED) * 3, 300, "pyvi")
    assert ids_of(tokenizer, list(SEGMENTED)) == ids_of(segmented, list(SEGMENTED.values()))


def test_a_segmenter_that_is_not_installed(visobert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyvi", None)
    message = "model.segmenter pyvi: pyvi is not installed; install it with `pip install --editable '.[segmenter]'`"
    assert refused(visobert, segmenter="pyvi") == message
    assert refused(EMBEDDED, segmenter="pyvi") == message


def test_the_segmenter_itself() -> None:
    pytest.importorskip("pyvi", reason="the extra segmenter is not installed")
    from pipeline.tasks.visobert.segmenter import load_segmenter

    assert load_segmenter("pyvi")("Điện thoại có pin tốt").split() == ["Điện_thoại", "có", "pin", "tốt"]


def test_a_vocabulary_without_a_tokenizer_file(tmp_path: Path) -> None:
    """WordPiece from vocab.txt: [CLS], the words, ## pieces, [SEP]."""
    vocabulary = [*WORDS, "pin", "tot", "##s", "lam"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    tokenizer = load_tokenizer(str(tmp_path), None, [], 0)
    assert ids_of(tokenizer, ["pin tots", "xyz lam"]) == [[2, 5, 6, 7, 3], [2, 1, 8, 3]]
    assert ids_of(tokenizer, ["pin tots"], 4) == [[2, 5, 6, 3]]
    assert (tokenizer.size, tokenizer.pad_id, tokenizer.mask_id) == (9, 0, 4)


def test_without_a_padding_token_padding_is_the_end(tmp_path: Path) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    tokenizer = load_tokenizer(str(folder_of(tmp_path / "model", trained("bpe"), "gpt2", config)), None, [], 0)
    assert (tokenizer.pad_id, tokenizer.mask_id) == (2, 2)


def refused(name: str | Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(name), None, [], 0, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    message = refused(tmp_path)
    assert str(tmp_path) in message
    assert "tokenizer.json" in message


@pytest.mark.parametrize("broken", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_is_named(visobert: Path, broken: str) -> None:
    (visobert / broken).write_text('{"version": ')
    assert str(visobert / broken) in refused(visobert)


@pytest.mark.parametrize("origin", ["visobert", "vocabulary", EMBEDDED])
def test_saved_and_loaded_it_gives_the_same_ids(tmp_path: Path, visobert: Path, origin: str) -> None:
    if origin == "vocabulary":
        folder_of(tmp_path / "words", trained("wordpiece"), "bert")
        (tmp_path / "words" / "tokenizer.json").unlink()
        (tmp_path / "words" / "vocab.txt").write_text("\n".join([*WORDS, "pin", "##n", "p", "##i", "may"]))
    names = {"visobert": str(visobert), "vocabulary": str(tmp_path / "words"), EMBEDDED: EMBEDDED}
    tokenizer = load_tokenizer(names[origin], None, TEXTS * 5, 300)
    before = ids_of(tokenizer, TEXTS, 7)
    tokenizer.save(tmp_path / "saved")
    again = load_saved(tmp_path / "saved", names[origin])
    assert ids_of(again, TEXTS, 7) == before
    assert ids_of(again, TEXTS) == ids_of(tokenizer, TEXTS)
    assert (again.size, again.pad_id, again.mask_id) == (tokenizer.size, tokenizer.pad_id, tokenizer.mask_id)
    if origin == EMBEDDED:
        assert again.digest == tokenizer.digest


def test_no_text_has_no_tokens(visobert: Path) -> None:
    for name in (str(visobert), EMBEDDED):
        tokenizer = load_tokenizer(name, None, TEXTS * 5, 300)
        tokens = tokenizer.encode([], 8)
        assert (len(tokens.ids), len(tokens.lengths)) == (0, 0)
        assert min(tokenizer.encode(["", " "], 8).lengths) >= 1  # an empty text still has its marks


def test_digests_tell_tokenizers_apart(visobert: Path, tmp_path: Path) -> None:
    first = load_tokenizer(str(visobert), None, [], 0)
    first.encode(TEXTS, 5)
    assert load_tokenizer(str(visobert), None, [], 0).digest == first.digest
    other = folder_of(tmp_path / "other", trained("bpe", normalizers.Lowercase()), "xlm-roberta", XLMR)
    small = [EmbeddedTokenizer.train(TEXTS * 5, size).digest for size in (300, 90)]
    assert len({first.digest, load_tokenizer(str(other), None, [], 0).digest, *small}) == 4


# ---------------------------------------------------------------- the one that is trained


def test_the_embedded_tokenizer_is_the_same_in_every_process(tmp_path: Path) -> None:
    code = (
        "import json, sys; from pipeline.tasks.visobert.tokenizer import EmbeddedTokenizer as Small;"
        "print(Small.train(json.loads(sys.argv[1]), 400).digest)"
    )
    texts = [f"{text} {number}" for number in range(50) for text in TEXTS]
    digests = {
        subprocess.run(
            [sys.executable, "-c", code, json.dumps(texts)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert digests == {EmbeddedTokenizer.train(texts, 400).digest}


@pytest.fixture(scope="module")
def small() -> EmbeddedTokenizer:
    return EmbeddedTokenizer.train(TEXTS * 5, 300)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([*" ".join(TEXTS), "\u0301", "ệ", "Ơ", "☺", "\n"]), max_size=40).map("".join))
def test_the_unicode_form_and_the_case_do_not_matter(small: EmbeddedTokenizer, text: str) -> None:
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
    ids = ids_of(small, [text, *forms, forms[0].lower()])
    assert ids[0] == ids[1] == ids[2] == ids[3]
    assert ids[0][0] == small.backend.token_to_id("<s>")
    assert all(0 <= token < small.size for token in ids[0])


def test_the_embedded_tokenizer_cuts_and_forgets_the_cut(small: EmbeddedTokenizer) -> None:
    whole, cut, after = (ids_of(small, TEXTS, limit) for limit in (None, 4, None))
    assert cut == [ids[:4] for ids in whole]
    assert after == whole
    assert small.size <= 300
    assert len({small.pad_id, small.mask_id, small.backend.token_to_id("<s>")}) == 3


def test_every_letter_counts_that_the_vocabulary_holds() -> None:
    """Of 500 letters, a number of times each; 300 entries are 4 special ones, the mark of a word and 295 letters."""
    texts = [" ".join([chr(0x4E00 + number)] * number) for number in range(1, 501)]
    for vocabulary, unknown in ((600, 0), (300, 500 - 295)):
        tokenizer = EmbeddedTokenizer.train(texts, vocabulary)
        tokens = tokenizer.encode(texts)
        count = unknown * (unknown + 1) // 2  # those of the rare letters
        assert (tokens.ids == tokenizer.unknown_id).sum() == count
        assert unknown_share(tokenizer, tokens.ids) == count / len(tokens.ids)


# ---------------------------------------------------------------- where files are looked for


def test_a_folder_is_taken_as_it_is(visobert: Path) -> None:
    assert model_folder(str(visobert), None, weights=False) == visobert
    with pytest.raises(UserError, match=r"model\.safetensors is missing.*model\.init: random"):
        model_folder(str(visobert), None, weights=True)
    (visobert / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert model_folder(str(visobert), None, weights=True) == visobert
    (visobert / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing") as caught:
        model_folder(str(visobert), None, weights=False)
    assert "model.init" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "./nowhere",
        "a/b/c",
        "../x",
        "/no/such/folder",
        "a b",
        "?",
        "someone/",
        "Embedded!",
        "a--b/c",
        "x..y",
        "-a",
        "someone/model-",
        "a" * 120,
    ],
)
def test_names_that_are_neither_folder_nor_hub_id(name: str) -> None:
    with pytest.raises(UserError, match=r"model\.name: found .* allowed: a hub id, a folder that exists, or embedded"):
        model_folder(name, None, weights=False)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client; every request fails."""
    from huggingface_hub import constants, get_session

    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    for method in ("request", "send", "get"):
        monkeypatch.setattr(type(get_session()), method, unreachable)
    return folder


def cached(hub: Path, name: str, *files: str, revision: str = "main") -> Path:
    """A snapshot in the form in which the hub's client keeps it."""
    store = hub / f"models--{name.replace('/', '--')}"
    commit = "c" * 40
    (store / "refs").mkdir(parents=True)
    (store / "refs" / revision).write_text(commit)
    snapshot = store / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in files:
        (snapshot / file).write_text("{}")
    return snapshot


def assert_tells_what_to_do(call: Callable[[], object], missing: str = "config.json") -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert f"{missing} is not in the local cache" in message
    assert "configs/config_multi_embedded.yaml" in message
    assert (ROOT / SMALL_CONFIG).is_file()
    return message


def test_without_a_network(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request tells: the hub's own client would try for half a minute."""
    from huggingface_hub import get_session

    session, tries = type(get_session()), []
    for method in ("request", "send", "get"):
        refuse = getattr(session, method)
        monkeypatch.setattr(session, method, lambda *a, refuse=refuse, **__: tries.append(str(a)) or refuse())
    message = assert_tells_what_to_do(lambda: model_folder("someone/model", None, weights=True))
    assert len([request for request in tries if "someone/model" in request]) == 1
    assert "no route to host" in message
    assert "someone/model" in message


def test_offline_by_the_hubs_own_switch(tmp_path: Path) -> None:
    """HF_HUB_OFFLINE is read when the client is imported: a process of its own."""
    code = (
        "from pipeline.errors import UserError\n"
        "from pipeline.tasks.visobert.encoders.model_folder import model_folder\n"
        "try: model_folder('someone/model', None, weights=True)\n"
        "except UserError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert process.stdout.startswith("model.name someone/model: config.json is not in the local cache")
    assert "HF_HUB_OFFLINE" in process.stdout
    assert SMALL_CONFIG in process.stdout


def test_a_snapshot_in_the_cache_needs_no_network(hub: Path) -> None:
    snapshot = cached(hub, "someone/model", "config.json", "tokenizer.json", "model.safetensors")
    assert model_folder("someone/model", None, weights=True) == snapshot
    assert model_folder("someone/model", None, weights=False) == snapshot


def test_a_snapshot_without_weights(hub: Path) -> None:
    snapshot = cached(hub, "someone/model", "config.json", "tokenizer.json")
    assert model_folder("someone/model", None, weights=False) == snapshot
    assert_tells_what_to_do(lambda: model_folder("someone/model", None, weights=True), "model.safetensors")


def test_another_revision_is_not_the_one_in_the_cache(hub: Path) -> None:
    snapshot = cached(hub, "someone/model", "config.json", revision="v1")
    assert model_folder("someone/model", "v1", weights=False) == snapshot
    assert_tells_what_to_do(lambda: model_folder("someone/model", None, weights=False))
    assert "revision v2" in assert_tells_what_to_do(lambda: model_folder("someone/model", "v2", weights=False))
