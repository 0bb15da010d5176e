"""Every public name has an example in its docstring, and the examples give what they say they give."""

import ast
import doctest
import importlib
import inspect
import re

import pytest
from judge_server import JudgeServer

import trl_flow


PACKAGES = ("algorithms", "backbones", "evaluation", "functional", "lora", "memory", "prompts", "rewards", "shapes")
MODULES = [trl_flow, *(importlib.import_module(f"trl_flow.{name}") for name in (*PACKAGES, "sharing", "trainer"))]
BLOCK = re.compile(r"^```(?:pycon|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
# What stands in examples for a server of one's own
REWARD_SERVER, JUDGE = "http://localhost:8000", "http://localhost:8001/v1"


def public() -> dict[str, object]:
    """The public names, each once, by the first module that has them."""
    found = {}
    for module in MODULES:
        for name in module.__all__:
            value = getattr(module, name)
            if not any(value is other and name == path.rpartition(".")[2] for path, other in found.items()):
                found[f"{module.__name__}.{name}"] = value
    return found


NAMES = public()
EXAMPLES = {
    path: BLOCK.findall(
        inspect.cleandoc(value.__dict__.get("__doc__") or "" if inspect.isclass(value) else value.__doc__ or "")
    )
    for path, value in NAMES.items()
    if callable(value)
}


def code_of(block: str) -> str:
    """The lines that are typed."""
    if not block.startswith(">>>"):
        return block
    return "".join(example.source for example in doctest.DocTestParser().get_examples(block))


def used(code: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}


def test_every_public_name_has_an_example():
    """A function or class in its own docstring; a constant in that of something it is used with."""
    everywhere = {name for blocks in EXAMPLES.values() for block in blocks for name in used(code_of(block))}
    missing = []
    for path in NAMES:
        name = path.rpartition(".")[2]
        own = {name for block in EXAMPLES.get(path, []) for name in used(code_of(block))}
        if name not in (own if path in EXAMPLES else everywhere):
            missing.append(path)
    assert missing == []


@pytest.fixture(scope="module")
def judge():
    """Prefers the second of two images, and gives 7 points to one."""
    with JudgeServer(lambda request: "2" if len(request.images) == 2 else "7") as server:
        yield server.base_url


@pytest.mark.parametrize("path", [path for path, blocks in EXAMPLES.items() if blocks])
def test_examples_run(path, reduced, request):
    """Each in a folder of its own; example models are tiny, and example servers are on the loopback interface."""
    text = "\n".join(EXAMPLES[path])
    if REWARD_SERVER in text:
        served = request.getfixturevalue("serve_rewards")(rewards="jpeg_compressibility")
        text = text.replace(REWARD_SERVER, served.url)
    if JUDGE in text:
        text = text.replace(JUDGE, request.getfixturevalue("judge"))
    if "upload" in text:
        request.getfixturevalue("hub_server")
    if ">>>" not in text:
        exec(compile(text, path, "exec"), {"__name__": "example"})
        return
    said: list[str] = []
    test = doctest.DocTestParser().get_doctest(text, {"__name__": "example"}, path, None, None)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    assert runner.run(test, out=said.append).attempted and not runner.failures, "".join(said)
