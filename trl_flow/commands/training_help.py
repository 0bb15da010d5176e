"""The help of `trl-flow train` and `trl-flow memory`: all options by subject, the method's own first. It is made
without the libraries that training needs."""

import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trl_flow.commands.fields import Field, dataclass_fields
from trl_flow.commands.methods import changed_defaults, config_fields, method_of, shown


# Subjects in the order in which a run is thought of. What is in none of them is the last one, which `--help all` lists
SUBJECTS: dict[str, tuple[str, ...]] = {
    "Model": (
        *("model_name_or_path", "model_revision", "dtype", "model_init_kwargs"),
        *("init_adapter", "reference", "component"),
        *("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save"),
        *("init_lora_weights", "use_rslora", "use_dora", "disable_dropout", "load_in_4bit", "load_in_8bit"),
    ),
    "Prompts": (
        *("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "prompt_column"),
        *("image_column", "shuffle_dataset"),
    ),
    "Rewards and advantages": (
        *("reward_funcs", "reward_weights", "reward_timeout", "overlap_rewards", "scale_rewards"),
        *("multi_objective_aggregation", "advantage_clip", "advantage_power", "target_kl", "reward_frame"),
        "projection_vae",
    ),
    "Sampling": (
        *("num_generations", "num_generations_trained", "num_inference_steps", "guidance_scale", "guidance_scale_2"),
        *("negative_prompt", "height", "width", "num_frames", "max_sequence_length", "share_initial_noise"),
        *("generation_batch_size", "steps_per_generation", "dynamic_sample", "max_resample_times"),
    ),
    "Optimization": (
        *("learning_rate", "max_steps", "num_train_epochs", "num_iterations", "per_device_train_batch_size"),
        *("gradient_accumulation_steps", "optim", "lr_scheduler_type", "warmup_steps", "weight_decay"),
        *("max_grad_norm", "use_ema", "ema_decay", "ema_update_every", "seed"),
    ),
    "Memory, precision and devices": (
        *("bf16", "fp16", "tf32", "gradient_checkpointing", "torch_compile", "torch_compile_mode"),
        *("torch_compile_backend", "use_regional_compilation", "attention_backend", "precompute_prompt_embeds"),
        *("prompt_embeds_dir", "enable_vae_slicing", "enable_vae_tiling", "use_cpu", "accelerate_config"),
    ),
    "Evaluation": (
        *("eval_strategy", "eval_steps", "eval_on_start", "eval_reward_funcs", "num_generations_eval"),
        *("eval_num_inference_steps", "eval_guidance_scale", "per_device_eval_batch_size"),
        *("over_optimization_patience", "over_optimization_stop", "over_optimization_num_standard_errors"),
        *("load_best_model_at_end", "metric_for_best_model"),
    ),
    "Saving and the Hub": (
        *("output_dir", "save_strategy", "save_steps", "save_total_limit", "resume_from_checkpoint", "push_to_hub"),
        *("hub_model_id", "hub_strategy", "hub_private_repo", "hub_revision"),
    ),
    "Logging": (
        *("logging_steps", "report_to", "run_name", "project", "log_images", "num_images_to_log"),
        *("diagnostics_steps", "disable_tqdm"),
    ),
}
REST = "Everything else of TRL's and transformers' arguments"
# Arguments of TRL's that have no effect here, and are refused
REFUSED = ("attn_implementation", "lora_task_type", "ignore_bias_buffers", "dataset_streaming", "streaming")
_COLUMN = 38


def wants_help(argv: Sequence[str]) -> bool:
    """Whether the arguments ask for help."""
    return not {"-h", "--help"}.isdisjoint(argv)


def training_help(
    argv: Sequence[str],
    recipe: Mapping[str, Any],
    *,
    usage: str,
    description: str,
    own: Mapping[str, str] | None = None,
) -> str:
    """The help of a command that takes a training's options and its `own`, which have a help each. With `--help all`
    it has those that hardly any run needs, too. `ValueError` if there is no such method as is asked for."""
    method = method_of(argv, recipe)
    fields = training_fields(method) | _with_defaults(training_fields(method), changed_defaults(argv, recipe))
    everything = [*argv][1 + max(i for i, token in enumerate(argv) if token in ("-h", "--help")) :][:1] == ["all"]
    width = min(shutil.get_terminal_size((119, 24)).columns, 119)
    parts = [f"usage: {usage}", description.strip(), "Each option stands with its default."]
    for subject, members in by_subject(method, fields).items():
        if subject == REST and not everything:
            parts.append(f"{len(members)} more options, of TRL's and transformers' own, are listed by --help all.")
            continue
        parts.append("\n".join([f"{subject}:", *(line for each in members for line in _lines(each, method, width))]))
    if own:
        parts.append("\n".join(["This command:", *(_row(name, help, width) for name, help in own.items())]))
    return "\n\n".join(parts)


def training_fields(method: str) -> dict[str, Field]:
    """All options of a training by the method."""
    script = dataclass_fields("trl_flow.commands.options", "FlowScriptArguments")
    model, mixture = dataclass_fields("trl", "ModelConfig"), dataclass_fields("trl", "DatasetMixtureConfig")
    return script | config_fields(method) | model | mixture


def by_subject(method: str, fields: Mapping[str, Field]) -> dict[str, list[Field]]:
    """The options by subject: first the method's own, and those whose default it changes."""
    listed = {name for names in SUBJECTS.values() for name in names}
    common = dataclass_fields("trl_flow.trainer.flow_rl_config", "FlowRLConfig")
    base = config_fields("flow_grpo")
    changed = [n for n, f in config_fields(method).items() if n in base and f.default != base[n].default]
    own = ["method", *changed, *(n for n in config_fields(method) if n not in common and n not in changed)]
    found = {f"The method, {method}": [fields[name] for name in own]}
    for subject, names in SUBJECTS.items():
        found[subject] = [fields[name] for name in names if name in fields and name not in own]
    left = [n for n in fields if n not in listed and n not in own and n not in REFUSED]
    return found | {REST: [fields[name] for name in left]}


def _with_defaults(fields: Mapping[str, Field], defaults: Mapping[str, Any]) -> dict[str, Field]:
    return {n: Field(n, value, fields[n].help, fields[n].choices) for n, value in defaults.items()}


def _lines(field: Field, method: str, width: int) -> Iterable[str]:
    text = field.help.rstrip(".")
    base = config_fields("flow_grpo").get(field.name)
    if field.choices:
        text += f" {{{', '.join(map(shown, field.choices))}}}"
    if method != "flow_grpo" and base is not None and config_fields(method)[field.name].default != base.default:
        text += f" (flow_grpo: {shown(base.default)})"
    yield _row(f"--{field.name} {method if field.name == 'method' else shown(field.default)}", text, width)


def _row(name: str, help: str, width: int) -> str:
    head, indent = f"  {name}", " " * _COLUMN
    lines = textwrap.wrap(help, max(width - _COLUMN, 30)) or [""]
    if len(head) > _COLUMN - 2:
        return "\n".join([head, *(indent + line for line in lines)])
    return "\n".join([head.ljust(_COLUMN) + lines[0], *(indent + line for line in lines[1:])])
