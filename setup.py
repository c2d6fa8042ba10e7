"""Copies train_configs/ into the package that is built: installed, the program finds its configurations by name."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """An editable install reads the folder where it is."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "torchtitan_style" / "train_configs"
            shutil.rmtree(target, ignore_errors=True)  # of an earlier build, maybe with files that are gone
            target.mkdir(parents=True)
            for path in sorted(Path(__file__).with_name("train_configs").glob("*.toml")):
                shutil.copyfile(path, target / path.name)


setup(cmdclass={"build_py": BuildWithConfigs})
