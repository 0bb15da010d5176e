"""Why a model cannot be loaded, where its files say so."""

import re
from pathlib import Path


# Of checkpoints as other tools load them: all weights of a pipeline in one file, or those of its transformer
_SINGLE = {".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf"}
# A file of weights, as diffusers and transformers name it: whole or a shard, of a variant or of none
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)


def loading_hint(path: str, error: Exception | None = None) -> str:
    """What to do instead where `path`, with `error`, could not be loaded as a pipeline: a sentence with a space in
    front, or nothing."""
    folder = Path(path)
    if variants := _only_variants(folder):
        return f" Its weights are of a variant only: {_say(variants[0])}"
    if "no file named" in str(error) and not folder.is_dir():
        return f" If its weights are of a variant only, such as fp16: {_say('fp16')}"
    files = [folder] if folder.suffix.lower() in _SINGLE else []
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SINGLE)
    if not files:
        return ""
    name = str(files[0])
    if files[0].suffix.lower() == ".gguf":
        return (
            f" {name} holds the weights of a transformer alone, quantized: load it with from_single_file(...) of the "
            "transformer's class (quantization_config=GGUFQuantizationConfig(...)), put it into a pipeline "
            "(from_pretrained(..., transformer=...)), and pass that."
        )
    return (
        f" {name} is a single file. Make a folder of it, once: StableDiffusion3Pipeline.from_single_file({name!r})"
        ".save_pretrained('folder'), with the class of the model's own pipeline, and give the folder. An adapter is "
        "no model: pass it together with its base model."
    )


def _say(variant: str) -> str:
    return (
        f"say variant={variant!r}. That is model_init_kwargs={{'variant': {variant!r}}} in the trainer's config, "
        f"--variant {variant} for trl-flow evaluate, and an argument of from_pretrained."
    )


def variants_in(folder: str | Path) -> set[str | None]:
    """The variants of which a pipeline's folder has weights, `None` for those without one."""
    return {match["variant"] for file in Path(folder).glob("*/*") if (match := _WEIGHTS.fullmatch(file.name))}


def _only_variants(folder: Path) -> list[str]:
    """The variants of the weights of a part of the pipeline that has none without a variant."""
    for part in sorted(path for path in folder.glob("*") if path.is_dir()):
        matches = [match for file in part.iterdir() if (match := _WEIGHTS.fullmatch(file.name))]
        variants = [match["variant"] for match in matches]
        if variants and None not in variants:
            return sorted(set(variants))
    return []
