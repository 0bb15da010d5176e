"""`trl-flow export`: an adapter for other tools. Libraries are imported when it runs."""

import argparse


DESCRIPTION = """\
Write an adapter as ComfyUI or kohya's scripts (sd-scripts, musubi-tuner) read it. These take alpha from `.alpha` keys
alone: without them they draw an adapter with lora_alpha twice its rank at half its strength.

  trl-flow export my-run --format comfyui --output my-run.safetensors
  trl-flow export my-run/checkpoint-100 --format kohya --output my-run.safetensors --model path/to/base

Of the base model only the configuration files are read; nothing is downloaded in full.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to a parser."""
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="a run's output folder, a checkpoint, a LoRA file, or a hub id")
    add("--format", required=True, choices=("comfyui", "kohya"), help="whose names to use")
    add("--output", required=True, metavar="FILE", help="the .safetensors file to write")
    what = "base model: hub id, folder of a pipeline, or `bundled` (the one that adapter_config.json names)"
    add("--model", help=what)
    add("--revision", help="its branch, tag or commit (the one that adapter_config.json names)")


def run(arguments: argparse.Namespace) -> None:
    """Writes the file. `ValueError` if the adapter, its base model or the format do not fit together."""
    import diffusers

    from trl_flow.backbones import BACKBONES
    from trl_flow.lora import export_lora
    from trl_flow.memory import empty_pipeline, fetch_configs

    diffusers.utils.logging.set_verbosity_error()
    if not arguments.output.endswith(".safetensors"):
        raise ValueError(f"output is {arguments.output!r}, but must be a file .safetensors.")
    model, revision = _base_model(arguments)
    pipeline = empty_pipeline(fetch_configs(model, revision=revision))
    component = BACKBONES[type(pipeline).__name__].component
    number = export_lora(pipeline, component, arguments.adapter, arguments.format, arguments.output)
    print(f"Wrote {arguments.output} for {arguments.format}: {number} modules of {type(pipeline).__name__}.")


def _base_model(arguments: argparse.Namespace) -> tuple[str, str | None]:
    if arguments.model in ("bundled", "shapes"):
        from trl_flow.shapes import pipeline_path

        return str(pipeline_path()), None
    if arguments.model is not None:
        return arguments.model, arguments.revision
    from trl_flow.lora import adapter_config

    config = adapter_config(arguments.adapter)
    if (model := config.get("base_model_name_or_path")) is None:
        raise ValueError(
            f"the base model of {arguments.adapter} is not known: no adapter_config.json beside it names one. "
            "Name it: --model HUB_ID, or the folder of the pipeline, or `bundled`."
        )
    return model, arguments.revision or config.get("revision")
