"""What is known of a training's options before its libraries are loaded: the recipe, and misspelled names."""

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


ACCELERATE_CONFIGS = Path(__file__).parents[1] / "accelerate_configs"


class Recipe(dict[str, Any]):
    """The options of a recipe, those of the recipes that it extends among them, and in which file each stands."""

    def __init__(self):
        super().__init__()
        self.files: dict[str, Path] = {}

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
    # YAML reads a bare `no` as False
    own |= {name: "no" for name, value in own.items() if name.endswith("_strategy") and value is False}
    recipe = Recipe()
    if "extends" in own:
        recipe = load_recipe(_base(path, own.pop("extends")), chain)
    if own.get("eval_strategy") == "no":
        recipe.remove_evaluation()
    for name, value in own.items():
        if value is None and name in recipe:
            del recipe[name], recipe.files[name]
        else:
            recipe[name], recipe.files[name] = value, path
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
    return path, _read_mapping(path, "accelerate config", "settings, such as `num_processes: 2`")


def _read_mapping(path: Path, kind: str, of: str) -> dict[str, Any]:
    import yaml

    name = f"the {kind} {os.fspath(path)!r}"

    class Loader(yaml.SafeLoader):
        """YAML's would take the last of several values, and not say so."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            keys = [str(key.value).replace("-", "_") for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := next((key for key in keys if keys.count(key) > 1), None):
                line = node.value[len(keys) - 1 - keys[::-1].index(twice)][0].start_mark.line + 1
                raise ValueError(f"{name} has {twice} twice, for the second time in line {line}. Remove one.")
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror or error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        received = "nothing" if content is None else f"a {type(content).__name__}"
        raise ValueError(f"{name} must be a YAML mapping of {of}, but holds {received}.")
    if wrong := [key for key in content if not isinstance(key, str)]:
        raise ValueError(f"{name} has the option {wrong[0]!r}, which YAML does not read as text. Put it in quotes.")
    return content


def option(argv: Sequence[str], recipe: Mapping[str, Any], name: str) -> Any:
    """The value of an option on which depends what else there is to parse; None where it is not given."""
    for index, token in enumerate(argv):
        option_name, equals, value = token.partition("=")
        if option_name.replace("-", "_") == f"__{name}" and (equals or index + 1 < len(argv)):
            return value if equals else argv[index + 1]
    return recipe.get(name)


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
