"""What is known of a training's options before its libraries are loaded: the recipe, and misspelled names."""

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_flow.commands.yaml_values import Loader, guessed


ACCELERATE_CONFIGS = Path(__file__).parents[1] / "accelerate_configs"
NULL = "null"


class Recipe(dict[str, Any]):
    """The options of a recipe, those of the recipes that it extends among them, in which file each stands, and as it
    is written there: what it means depends on the option's type."""

    def __init__(self):
        super().__init__()
        self.files: dict[str, Path] = {}
        self.written: dict[str, Any] = {}

    def remove_evaluation(self) -> None:
        """Without evaluations there are no gold scores, and there is nothing to watch."""
        for name in [name for name in self if name == "eval_reward_funcs" or name.startswith("over_optimization_")]:
            del self[name], self.files[name]


def read_recipe(argv: list[str]) -> tuple[list[str], Recipe]:
    """The arguments, with `--config=PATH` as two of them, and the options in the recipe (none without `--config`)."""
    argv = [part for token in argv for part in (token.split("=", 1) if token.startswith("--config=") else [token])]
    if "--config" not in argv:
        return argv, Recipe()
    path = argv[argv.index("--config") + 1 :][:1]
    if not path:
        raise ValueError("--config needs the path of a YAML file.")
    return argv, load_recipe(Path(path[0]))


def load_recipe(path: Path, extended_by: tuple[Path, ...] = ()) -> Recipe:
    """
    The options of a recipe. One with `extends: base.yaml`, a path from its own folder, has all options of that recipe
    (which may extend another) but for those that it names itself; naming one as `null` takes it away, and
    `eval_strategy: no` all that needs evaluations. In names, `-` is `_`.

    Raises:
        ValueError: if a file is missing or no mapping, or a recipe extends itself; it names the file.
    """
    chain = (*extended_by, path)
    if any(path.resolve() == other.resolve() for other in extended_by):
        raise ValueError(f"the recipe {str(path)!r} extends itself: {' -> '.join(map(str, chain))}.")
    own = _read_mapping(path, "recipe", "options, such as `learning_rate: 1e-4`")
    own = {name.replace("-", "_"): value for name, value in own.items()}
    recipe = Recipe()
    if "extends" in own:
        recipe = load_recipe(_base(path, own.pop("extends")), chain)
    if guessed(own.get("eval_strategy", "")) in ("no", False, None):
        recipe.remove_evaluation()
    for name, value in own.items():
        if value is None and name in recipe:
            del recipe[name], recipe.files[name]
        else:
            recipe[name], recipe.written[name], recipe.files[name] = guessed(value), value, path
    return recipe


def _base(path: Path, name: Any) -> Path:
    """The file that a recipe at `path` extends by `name`."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"the recipe {str(path)!r} extends {name!r}, but must name one file: `extends: base.yaml`.")
    base = path.parent / Path(name).expanduser()
    if not base.is_file():
        near = did_you_mean(base.name, [file.name for file in base.parent.glob("*.y*ml") if file.name != path.name])
        raise ValueError(f"the recipe {str(path)!r} extends {name!r}, but there is no file {str(base)!r}.{near}")
    return base


def read_accelerate_config(name: str) -> tuple[Path, dict[str, Any]]:
    """The path and the content of an accelerate config: a file, or one that is shipped."""
    path = Path(name) if Path(name).is_file() else ACCELERATE_CONFIGS / f"{name}.yaml"
    if not path.is_file():
        names = sorted(path.stem for path in ACCELERATE_CONFIGS.glob("*.yaml"))
        raise ValueError(f"accelerate_config is {name!r}, which is neither a file nor one of {', '.join(names)}.")
    return path, guessed(_read_mapping(path, "accelerate config", "settings, such as `num_processes: 2`"))


def _read_mapping(path: Path, kind: str, of: str) -> dict[str, Any]:
    """The mapping in a YAML file, with plain values as they stand there."""
    import yaml

    name = f"the {kind} {os.fspath(path)!r}"
    try:
        content = yaml.load(path.read_bytes(), type("_Loader", (Loader,), {"file": name}))
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror or error}.") from error
    except (yaml.reader.ReaderError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is not UTF-8 text: {error}. Save it as UTF-8.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        received = "nothing" if content is None else f"a {type(guessed(content)).__name__}"
        raise ValueError(f"{name} must be a YAML mapping of {of}, but holds {received}.")
    if wrong := [key for key in content if not isinstance(key, str)]:
        raise ValueError(f"{name} has the option {wrong[0]!r}, which YAML does not read as text. Put it in quotes.")
    return {str(key): value for key, value in content.items()}


def option(argv: Sequence[str], recipe: Mapping[str, Any], name: str) -> Any:
    """The value of an option on which depends what else there is to parse; None where it is not given."""
    for index, token in enumerate(argv):
        option_name, equals, value = token.partition("=")
        if option_name.replace("-", "_") == f"__{name}" and (equals or index + 1 < len(argv)):
            value = value if equals else argv[index + 1]
            return None if value == NULL else value
    return recipe.get(name)


def without_nulls(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments without `--name null`, and the names: null on the command line is what it is in a recipe."""
    left, names = [], []
    for token in argv:
        if token == NULL and left and left[-1].startswith("--") and "=" not in left[-1]:
            names.append(left.pop())
        elif token.startswith("--") and token.endswith(f"={NULL}"):
            names.append(token.partition("=")[0])
        else:
            left.append(token)
    return left, [name.removeprefix("--").replace("-", "_") for name in names]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean ...?"`, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def unknown_option(token: str, known: Iterable[str], recipe: Recipe | None = None) -> str:
    """What to say about an option that does not exist, on the command line or in `recipe`."""
    name = token.split("=")[0]
    file = recipe.files.get(name.removeprefix("--")) if recipe else None
    where = f", which {str(file)!r} has" if file else ""
    near = did_you_mean(name, [*known, "--config", *(["--extends"] if file else [])])
    return f"there is no option {name}{where}.{near or ' --help lists all options.'}"
