"""What is installed is what was written: contents, dependencies, names, commands, and the script of the checks."""

import ast
import configparser
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import trl_flow


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "trl_flow"

# Where the module that is imported is not called like the distribution that brings it
DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow", "python_multipart": "python-multipart"}
# Extras for what is no part of the package's own use of other packages
NOT_IMPORTED = {"dev", "docs", "lint", "quantization", "test"}


def run_python(*arguments: str) -> str:
    # Without `CI`, as at a user's: TRL behaves differently where it is set.
    environment = {key: value for key, value in os.environ.items() if key != "CI"}
    command = [sys.executable, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def setup_cfg():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def requirements(text: str) -> dict[str, str]:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    return {re.split(r"[<>=~\[]", line)[0]: line for line in lines}


# --- contents ---


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    """Names of the files in a wheel built from a copy, since building writes into the source folder."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(PACKAGE, copy / "trl_flow", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools.build_meta import build_wheel; build_wheel('out')"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True, timeout=300)
    (path,) = (copy / "out").glob("*.whl")
    return set(zipfile.ZipFile(path).namelist())


def test_wheel_holds_every_file_of_the_package(wheel):
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "trl_flow/py.typed" in wanted
    assert "trl_flow/shapes/pipeline/model_index.json" in wanted
    assert wanted - wheel == set()


def test_wheel_holds_nothing_else_but_its_metadata(wheel):
    others = {name for name in wheel if not name.startswith("trl_flow/")}
    assert all(re.match(r"trl_flow-[^/]+\.dist-info/", name) for name in others), others


def test_nothing_that_could_be_unpickled_is_shipped(wheel):
    assert not [name for name in wheel if Path(name).suffix in {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}]


# --- dependencies ---


def imported_distributions() -> dict[str, set[str]]:
    """Distribution -> files of the package that import it, wherever in the file."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            else:
                continue
            for module in modules:
                top = module.split(".")[0]
                if top != "trl_flow" and top not in sys.stdlib_module_names:
                    found.setdefault(DISTRIBUTIONS.get(top, top), set()).add(path.name)
    return found


def test_what_the_package_imports_is_what_it_requires(setup_cfg):
    imported = imported_distributions()
    required = set(requirements(setup_cfg["options"]["install_requires"]))
    for extra, lines in setup_cfg["options.extras_require"].items():
        if extra not in NOT_IMPORTED:
            required |= set(requirements(lines))
    undeclared = {name: files for name, files in imported.items() if name not in required}
    assert undeclared == {}
    # RapidOCR needs a runtime and leaves the choice to those who use it; ftfy is diffusers' business; the others are
    # imported by `import_module`
    others = {"ftfy", "httpx2", "imageio-ffmpeg", "onnxruntime"}
    assert required - imported.keys() == others, "required, but imported nowhere"


def test_importing_a_reward_or_a_command_needs_no_extra(setup_cfg):
    """Optional packages are asked for where they are used: modules load without them."""
    extras = setup_cfg["options.extras_require"]
    optional = {name for extra in ("judge", "ocr", "serve") for name in requirements(extras[extra])}
    modules = {module for module, name in DISTRIBUTIONS.items() if name in optional} | optional
    code = (
        f"import sys; blocked = {sorted(modules)}\n"
        "for name in blocked: sys.modules[name] = None\n"
        "import trl_flow.rewards as rewards, trl_flow.serving.command\n"
        "import trl_flow.evaluation.evaluate_command, trl_flow.prompts\n"
        "print(len([getattr(rewards, name) for name in rewards.__all__]))"
    )
    assert int(run_python("-c", code)) > 10


def test_every_requirement_has_a_lower_bound_and_only_trl_an_upper_one(setup_cfg):
    extras = (lines for extra, lines in setup_cfg["options.extras_require"].items() if extra not in NOT_IMPORTED)
    for name, line in requirements("\n".join([setup_cfg["options"]["install_requires"], *extras])).items():
        assert f"{name}>=" in line
        assert ("<" in line) == (name == "trl"), line


def test_ci_installs_what_the_extras_ask_for(setup_cfg):
    script = (ROOT / ".ci" / "run").read_text()
    for extra in ("docs", "lint"):
        assert all(line in script for line in requirements(setup_cfg["options.extras_require"][extra]).values())
    assert "\nrequired-version = " in (ROOT / ".ruff.toml").read_text()


# --- names and commands ---


def test_version_is_that_of_the_installed_distribution():
    assert trl_flow.__version__ == importlib.metadata.version("trl_flow")


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, trl_flow; print(sorted({'torch', 'transformers', 'diffusers', 'trl'} & sys.modules.keys()))"
    assert run_python("-c", code).strip() == "[]"


@pytest.mark.parametrize("name", trl_flow.__all__)
def test_public_names_are_classes_of_that_name(name):
    assert getattr(trl_flow, name).__name__ == name
    assert name in dir(trl_flow)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'trl_flow' has no attribute 'FlowGRPO'"):
        trl_flow.FlowGRPO  # noqa: B018
    with pytest.raises(ImportError):
        importlib.import_module("trl_flow.flow_grpo")


def test_console_script_and_module_are_the_same_program():
    (script,) = (s for s in importlib.metadata.distribution("trl_flow").entry_points if s.group == "console_scripts")
    assert (script.name, script.value) == ("trl-flow", "trl_flow.cli:main")
    command = [Path(sys.executable).with_name("trl-flow"), "--help"]
    help_of_script = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert {"demo", "train", "env"} <= set(re.findall(r"\w+", help_of_script))
    assert run_python("-m", "trl_flow", "--help") == help_of_script


def test_help_of_the_command_is_quick():
    code = """
import sys
sys.argv = ["trl-flow", "--help"]
try:
    import trl_flow.cli
    trl_flow.cli.main()
except SystemExit:
    pass
print("HEAVY", sorted({"torch", "transformers", "diffusers", "trl"} & sys.modules.keys()))
"""
    assert run_python("-c", code).splitlines()[-1] == "HEAVY []"


# --- the script of the checks ---


def test_ci_runs_the_test_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    (pattern,) = re.findall(r"--extended-regexp '([^']+)'", script)
    commands = [line for line in (ROOT / "README.md").read_text().splitlines() if re.search(pattern, line)]
    assert commands and set(commands) == {'pip install -e ".[test]" && pytest'}


def test_ci_stops_where_the_readme_has_no_test_command(tmp_path):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    (tmp_path / "README.md").write_text("pip install -e .\n")
    ended = subprocess.run(["bash", tmp_path / ".ci" / "run"], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "README.md has no line of the form" in ended.stderr
