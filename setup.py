"""Builds the compiled registry, lock and event queue; everything else stands in pyproject.toml."""

import os
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BUILD = os.environ.get("BGTASKS_BUILD", "auto")
TRACE = os.environ.get("BGTASKS_TRACE", "0")
for variable, value, values in (
    ("BGTASKS_BUILD", BUILD, ("auto", "require", "skip")),
    ("BGTASKS_TRACE", TRACE, ("0", "1")),
):
    if value not in values:
        sys.exit(f"{variable}={value!r} is unknown; it takes one of: {', '.join(values)}")


class BuildRegistry(build_ext):
    """Builds the extension; under BGTASKS_BUILD=auto a machine that cannot gets the Python twin and is told so."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if BUILD == "require":
                raise
            self.extensions = []
            print(
                f"bgtasks: the compiled registry was not built ({type(error).__name__}: {error}); "
                "installing the Python twin, which does the same more slowly. "
                "BGTASKS_BUILD=require makes this an error.",
                file=sys.stderr,
            )


def extensions() -> list[Extension]:
    if BUILD == "require" and sys.implementation.name != "cpython":
        sys.exit(f"BGTASKS_BUILD=require: the compiled registry is for CPython, this is {sys.implementation.name}")
    if BUILD == "skip" or sys.implementation.name != "cpython":
        return []
    from Cython.Build import cythonize

    # The symbols and lines of the C code are six times its size; a build that is traced keeps them.
    strips = TRACE == "0" and sys.platform.startswith("linux")
    options = {"extra_compile_args": ["-g0"], "extra_link_args": ["-Wl,-s"]} if strips else {}
    macros = [("CYTHON_TRACE_NOGIL", "1"), ("CYTHON_USE_SYS_MONITORING", "0")] if TRACE == "1" else []

    def extension(folder: str, name: str, *headers: str) -> Extension:
        return Extension(
            f"{folder.replace('/', '.')}.{name}",
            [f"src/{folder}/{name}.pyx"],
            depends=[f"src/{folder}/{header}" for header in headers],
            include_dirs=[f"src/{folder}"],
            define_macros=macros,
            optional=BUILD == "auto",
            **options,
        )

    return cythonize(
        [
            extension("bgtasks", "_registry", "_clock.h", "_coroutine.h", "_tracked_task.h", "_weak.h"),
            extension("bgtasks", "_lock"),
            extension("bgtasks/events", "_queue", "_footprint.h"),
        ],
        compiler_directives={"linetrace": TRACE == "1"},
        annotate=TRACE == "1",
    )


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildRegistry})
