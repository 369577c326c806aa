"""Makes links to the reference of the names in code font: ``create_task`` in a page or a docstring needs no role.

A name is looked up in the class whose docstring it stands in, then in the package, then among the methods of the
objects that pages talk about. One that could mean two things stays as it is, and so does every name in a heading or a
link.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.domains.python import PythonDomain
from sphinx.ext.intersphinx import InventoryAdapter
from sphinx.transforms.post_transforms import SphinxPostTransform

# ``create_task``, ``bgtasks.run(main)``, ``await manager.shutdown()``: a dotted name, perhaps called.
NAME = re.compile(r"(?:await |async with |with |@)?([A-Za-z_][\w.]*)(?:\(.*\)|\[\.\.\.\])?", re.DOTALL)
# What pages call an object, and its class.
OBJECTS = {
    "app_manager": "bgtasks.BackgroundTaskManager",
    "manager": "bgtasks.BackgroundTaskManager",
    "task_manager": "bgtasks.BackgroundTaskManager",
    "publisher": "bgtasks.events.Publisher",
    "sink": "bgtasks.events.Sink",
    "spool": "bgtasks.events.spool.Spool",
}
# Where a bare name is looked up; a method must be in one of the classes alone.
MODULES = ("bgtasks", "bgtasks.events", "bgtasks.injection")
CLASSES = ("bgtasks.BackgroundTaskManager", "bgtasks.events.Publisher")
# Defaults in signatures, and what they stand for.
DEFAULTS = {
    "<factory>": "...",
    "_manager_default": "Inject[BackgroundTaskManager]",
    "_publisher_default": "Inject[BasePublisher]",
}
# Pages that include a file from the root of the repository, by the name that other files there link to.
PAGES_OF_FILES = {"ARCHITECTURE.md": "architecture", "CHANGELOG.md": "changelog", "CONTRIBUTING.md": "contributing"}
# Types in signatures that are documented under another name, or are no classes.
ALIASES = {
    "AnySpool": "bgtasks.events.AnySpool",
    "EventOverflow": "bgtasks.events.EventOverflow",
    "Framework": "bgtasks.integrations.agentflow.Framework",
    "_asyncio.Task": "asyncio.Task",
    "asyncio.events.AbstractEventLoop": "asyncio.AbstractEventLoop",
    "concurrent.futures._base.Future": "concurrent.futures.Future",
}
NOT_LINKED_IN = (nodes.title, nodes.reference, addnodes.desc_signature, addnodes.pending_xref)


class ApiLinks(SphinxPostTransform):
    """Puts a link around each literal that names something of the reference, or of Python's own documentation."""

    default_priority = 20

    def run(self, **kwargs: Any) -> None:
        """Go through one page."""
        domain = self.env.domains["py"]
        assert isinstance(domain, PythonDomain)
        self.objects = domain.objects
        self.classes: defaultdict[str, list[str]] = defaultdict(list)
        for full_name, entry in self.objects.items():
            if entry.objtype in ("class", "exception") and not entry.aliased:
                self.classes[full_name.rpartition(".")[2]].append(full_name)
        self.python = InventoryAdapter(self.env).main_inventory
        for literal in list(self.document.findall(nodes.literal)):
            parents = list(_parents(literal))
            if any(isinstance(parent, NOT_LINKED_IN) for parent in parents):
                continue
            match = NAME.fullmatch(literal.astext())
            if match is None:
                continue
            found = (
                self._in_package(match[1], _scopes(parents))
                or self._in_environment(match[1])
                or self._in_python(match[1])
            )
            if found is not None:
                address, title = found
                link = nodes.reference("", "", refuri=address, reftitle=title, internal=True)
                literal.replace_self(link)
                link += literal

    def _in_package(self, name: str, scopes: list[str]) -> tuple[str, str] | None:
        """Return the address and the full name of what a name means in this package; None if that is not certain."""
        full_name = self._full_name(name, scopes)
        # A link from an entry of the reference to itself says nothing.
        if full_name is None or full_name in scopes[:1]:
            return None
        entry = self.objects[full_name]
        return self._address(entry.docname, entry.node_id), full_name

    def _full_name(self, name: str, scopes: list[str]) -> str | None:
        head, _, rest = name.partition(".")
        candidates = [f"{scope}.{name}" for scope in scopes]
        if head == "bgtasks":
            candidates.append(name)
        elif rest and head in OBJECTS:
            candidates.append(f"{OBJECTS[head]}.{rest}")
        elif rest:
            candidates += [f"{module}.{name}" for module in MODULES]
        else:
            # Not a module: "the extra ``events``", "the option ``spool``".
            candidates += [f"{module}.{name}" for module in MODULES if not self._is(f"{module}.{name}", "module")]
            methods = [f"{kind}.{name}" for kind in CLASSES if self._is(f"{kind}.{name}", "method")]
            if len(methods) == 1:
                candidates += methods
            if len(self.classes.get(name, ())) == 1:
                candidates += self.classes[name]
        return next((candidate for candidate in candidates if candidate in self.objects), None)

    def _is(self, full_name: str, kind: str) -> bool:
        return full_name in self.objects and self.objects[full_name].objtype == kind

    def _in_environment(self, name: str) -> tuple[str, str] | None:
        """Return the address and the name of an environment variable."""
        found = self.env.domains.standard_domain.objects.get(("envvar", name))
        return None if found is None else (self._address(*found), name)

    def _address(self, page: str, anchor: str) -> str:
        assert self.app.builder is not None
        return f"{self.app.builder.get_relative_uri(self.env.docname, page)}#{anchor}"

    def _in_python(self, name: str) -> tuple[str, str] | None:
        """Return the address and the full name of something with a dotted name in Python's documentation."""
        if "." not in name:
            return None
        for role in ("class", "exception", "function", "method", "data", "attribute", "module"):
            entry = self.python.get(f"py:{role}", {}).get(name)
            if entry is not None:
                return entry.uri, name
        return None


def _parents(node: nodes.Node) -> Iterator[nodes.Element]:
    parent = node.parent
    while parent is not None:
        yield parent
        parent = parent.parent


def _scopes(parents: list[nodes.Element]) -> list[str]:
    """Return the names of the entries of the reference that a node stands in, from the inside."""
    scopes = []
    for parent in parents:
        if isinstance(parent, addnodes.desc):
            signature = parent.next_node(addnodes.desc_signature)
            if signature is not None and signature.get("ids"):
                scopes.append(signature["ids"][0])
    return scopes


def follow_aliases(app: Sphinx, document: nodes.document) -> None:
    """Have types in signatures refer to the names under which they are documented, and files to their pages."""
    for reference in document.findall(addnodes.pending_xref):
        page = PAGES_OF_FILES.get(reference.get("reftarget"))
        if page is not None:
            reference.update_all_atts({"refdomain": "std", "reftype": "doc", "reftarget": f"/{page}"}, replace=True)
        target = ALIASES.get(reference.get("reftarget"))
        if target is not None:
            reference["reftarget"] = target
            reference["reftype"] = "obj"


def tidy_signature(
    app: Sphinx, kind: str, name: str, thing: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Show no arguments for a protocol, and readable defaults."""
    if getattr(thing, "_is_protocol", False) and isinstance(thing, type):
        return "", None
    for default, meaning in DEFAULTS.items():
        signature = signature and signature.replace(default, meaning)
    return signature, returns


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the transform."""
    app.connect("autodoc-process-signature", tidy_signature)
    app.connect("doctree-read", follow_aliases)
    app.add_post_transform(ApiLinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
