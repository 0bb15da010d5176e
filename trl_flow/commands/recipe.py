"""What is known of a training's options before its libraries are loaded: the recipe, and misspelled names."""

import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


ACCELERATE_CONFIGS = Path(__file__).parents[1] / "accelerate_configs"


def read_recipe(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The arguments, with `--config=PATH` as two of them, and the options in the recipe (none without `--config`)."""
    argv = [part for token in argv for part in (token.split("=", 1) if token.startswith("--config=") else [token])]
    if "--config" not in argv:
        return argv, {}
    path = argv[argv.index("--config") + 1 :][:1]
    if not path:
        raise ValueError("--config needs the path of a YAML file.")
    return argv, _read_mapping(Path(path[0]), "recipe", "options, such as `learning_rate: 1e-4`")


def read_accelerate_config(name: str) -> tuple[Path, dict[str, Any]]:
    """The path and the content of an accelerate config: a file, or one that is shipped."""
    path = Path(name) if Path(name).is_file() else ACCELERATE_CONFIGS / f"{name}.yaml"
    if not path.is_file():
        names = sorted(path.stem for path in ACCELERATE_CONFIGS.glob("*.yaml"))
        raise ValueError(f"accelerate_config is {name!r}, which is neither a file nor one of {', '.join(names)}.")
    return path, _read_mapping(path, "accelerate config", "settings, such as `num_processes: 2`")


def _read_mapping(path: Path, kind: str, of: str) -> dict[str, Any]:
    import yaml

    name = f"the {kind} {os.fspath(path)!r}"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror or error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        received = "nothing" if content is None else f"a {type(content).__name__}"
        raise ValueError(f"{name} must be a YAML mapping of {of}, but holds {received}.")
    return content


def option(argv: Sequence[str], recipe: dict[str, Any], name: str) -> Any:
    """The value of an option on which depends what else there is to parse; None where it is not given."""
    for index, token in enumerate(argv):
        option_name, equals, value = token.partition("=")
        if option_name == f"--{name}" and (equals or index + 1 < len(argv)):
            return value if equals else argv[index + 1]
    return recipe.get(name)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean ...?"`, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def unknown_option(token: str, known: Iterable[str]) -> str:
    """What to say about an option that does not exist."""
    name = token.split("=")[0]
    return f"there is no option {name}.{did_you_mean(name, known) or ' --help lists all options.'}"
