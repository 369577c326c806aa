"""Every program in the documentation runs, and every link and command in it leads somewhere."""

import re
import subprocess
import sys
import tomllib

import pytest
from frameworks import FRAMEWORKS, needed
from paths import ROOT
from requirements import need

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
# A program, and the output that a page shows after a line such as "It prints:".
BLOCK = re.compile(
    r"^```python\n(.*?)^```\n(?:\n[^\n`]*\bprints\b[^\n]*:\n\n```text\n(.*?)^```)?", re.MULTILINE | re.DOTALL
)
PROGRAMS = [
    pytest.param(program, output, id=f"{page.name}-{number}")
    for page in PAGES
    for number, (program, output) in enumerate(BLOCK.findall(page.read_text()))
]

# The package index shows the README without the files around it: its links lead here.
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
SOURCE = f"{URLS['Source']}/blob/main/"
# Where the index gets its pictures from.
RAW = SOURCE.replace("github.com", "raw.githubusercontent.com").replace("/blob/", "/")

# Where a part of the package, or a package of others, stands for another one that has to be there.
STANDS_FOR = {
    "injection": "injectq",
    "kafka": "confluent_kafka",
    "langgraph": "langgraph.pregel",
    "prometheus": "prometheus_client",
    "otlp": "opentelemetry.exporter.otlp.proto.http",
    "rabbitmq": "aio_pika",
    "testclient": "httpx2",
}
# What a reader starts on the usual port is one of the tests' servers here.
SERVERS = {
    "amqp://guest:guest@localhost/": "rabbit_server",
    "localhost:9092": "kafka_broker",
    "nats://localhost:4222": "nats_server",
    "redis://localhost:6379/0": "redis_server",
}


def packages_of(program):
    """Return the packages of others that a program imports, itself or through ours."""
    imported = set(re.findall(r"^(?:from|import) (\w+)", program, re.MULTILINE))
    for names in re.findall(r"\bbgtasks\.integrations(?:\.(\w+)| import (\w+))", program):
        imported.update(filter(None, names))
    imported.update(re.findall(r"\bbgtasks\.(injection)\b", program))
    imported.update(re.findall(r"\bbgtasks\.watch\.(opentelemetry|prometheus)\b", program))
    imported.update(re.findall(r"^from \w+\.(testclient) ", program, re.MULTILINE))
    imported.update(re.findall(r"\bbgtasks\.events\.sinks\.(kafka|nats|otlp|rabbitmq|redis)\b", program))
    return sorted({STANDS_FOR.get(name, name) for name in imported} - sys.stdlib_module_names - {"bgtasks"})


def test_there_are_programs():
    """The pages were found and hold programs."""
    assert len(PROGRAMS) >= 7


@pytest.mark.parametrize(("program", "output"), PROGRAMS)
def test_a_program_of_the_documentation_runs(request, program, output, tmp_path):
    """A block of Python is a whole program: with warnings as errors it ends well, and prints what the page shows."""
    for package in packages_of(program):
        (needed if package in FRAMEWORKS else need)(package)
    for address, fixture in SERVERS.items():
        if address in program:
            program = program.replace(address, request.getfixturevalue(fixture).url)
    file = tmp_path / "program.py"
    file.write_text(program)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", file],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "never awaited" not in done.stderr
    if output:
        assert done.stdout == output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_commands_lead_somewhere(page):
    """Relative links, links to files of the repository, and the scripts named in shell blocks exist."""
    text = page.read_text()
    links = re.findall(r"\]\(([^)#]+)", text) + re.findall(r"^\[\w+\]: ([^#\s]+)", text, re.MULTILINE)
    targets = [page.parent / link for link in links if "://" not in link]
    for base in (SOURCE, RAW):
        targets += [ROOT / link.removeprefix(base) for link in links if link.startswith(base)]
    targets += [ROOT / script for script in re.findall(r"^(scripts/\w+)", text, re.MULTILINE)]
    assert [target for target in targets if not target.exists()] == []


def test_the_readme_links_by_address_alone():
    """A relative link would lead nowhere on the package index; every address is that of a file, or of another site."""
    text = (ROOT / "README.md").read_text()
    assert re.findall(r"\]\((?!https://)[^)]*\)", text) == []
    assert sorted(set(re.findall(r"\]\[(\w+)\]", text))) == re.findall(r"^\[(\w+)\]: https://", text, re.MULTILINE)


def test_the_overview_of_the_readme_stands_alone():
    """It is legible on a light page and on a dark one: it has a ground and colours of its own for each, no script."""
    (address,) = re.findall(r"^\[overview\]: (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert address.startswith(RAW)
    picture = (ROOT / address.removeprefix(RAW)).read_text()
    assert "prefers-color-scheme: dark" in picture
    assert '<rect class="page"' in picture
    # The index shows no picture that loads something.
    assert re.findall(r"<script|<image|href=|url\((?!#)|var\(--color", picture) == []
    assert "<title" in picture


def test_the_extra_all_has_all_but_the_heavy_ones():
    """A new extra is in it, or is named here; the README names all of them."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    everything = {extra for entry in extras["all"] for extra in re.findall(r"[\w-]+", entry.partition("[")[2])}
    assert everything == set(extras) - {"agentflow", "all", "tenxgraph"}
    table = (ROOT / "README.md").read_text().partition("| extra | for |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) >= set(extras)


@pytest.mark.parametrize("url", [url for url in URLS.values() if url.startswith(SOURCE)])
def test_the_addresses_of_the_project_lead_to_files(url):
    """They are on the page of the package index."""
    assert (ROOT / url.removeprefix(SOURCE)).exists()


def test_every_command_is_named():
    """The page for contributors names each script, and no other."""
    named = re.findall(r"scripts/(\w+)", (ROOT / "CONTRIBUTING.md").read_text())
    assert {file.name for file in ROOT.glob("scripts/*") if file.is_file()} == set(named)


def test_every_example_is_named():
    """A page names each example, or another example imports it."""
    pages = "".join(page.read_text() for page in PAGES)
    examples = list(ROOT.glob("examples/*.py"))
    imported = set(re.findall(r"^from (\w+) import", "".join(file.read_text() for file in examples), re.MULTILINE))
    assert [file.name for file in examples if f"examples/{file.name}" not in pages and file.stem not in imported] == []


def test_the_docstring_of_the_manager_names_every_argument(manager_of_twin):
    """Each constructor argument of design and code is described."""
    manager = manager_of_twin.BackgroundTaskManager
    for name in manager.__init__.__annotations__:
        if name != "return":
            assert f"{name}:" in manager.__doc__
