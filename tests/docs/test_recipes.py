"""The numbers of the recipe for Docker and Kubernetes fit together, and the settings are those of the table."""

import re

from paths import ROOT

TEXT = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
SECTION = TEXT.partition("## Docker and Kubernetes")[2].partition("\n## ")[0]
ROWS = [
    (platform, setting, int(time), int(before), int(deadline))
    for platform, setting, time, before, deadline in re.findall(
        r"^\| (\S.*?) \| (.*?) \| (\d+) s \| (\d+)(?: s)? \| (\d+) \|", SECTION, re.MULTILINE
    )
]
COMPOSE, POD = re.findall(r"^```yaml\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)


def number(pattern, text):
    """Return the number that a pattern finds in a text."""
    return int(re.search(pattern, text)[1])


def test_a_deadline_leaves_time_until_the_platform_kills():
    """At least two seconds, and five where the platform waits long."""
    assert len(ROWS) == 5
    for _, setting, time, before, deadline in ROWS:
        assert time - before - deadline >= (2 if time == 10 else 5), setting


def test_the_file_for_compose_has_numbers_of_the_table():
    """Its requests end before its tasks have to."""
    grace = number(r"stop_grace_period: (\d+)s", COMPOSE)
    deadline = number(r'SHUTDOWN_DEADLINE: "(\d+)"', COMPOSE)
    assert ("Docker, Compose", f"`stop_grace_period: {grace}s`", grace, 0, deadline) in ROWS
    assert number(r'graceful-shutdown", "(\d+)"', COMPOSE) < deadline


def test_the_pod_has_numbers_of_the_table():
    """The time of ``preStop`` is part of the platform's."""
    grace = number(r"terminationGracePeriodSeconds: (\d+)", POD)
    before = number(r"sleep: \{seconds: (\d+)\}", POD)
    deadline = number(r'SHUTDOWN_DEADLINE, value: "(\d+)"', POD)
    assert ("Kubernetes", grace, before, deadline) in [(row[0], *row[2:]) for row in ROWS]
    assert number(r'graceful-shutdown", "(\d+)"', POD) < deadline
