"""Adds configs/ to the wheel as amltrain/configs. Everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["amltrain*"]), "amltrain.configs"],
    package_dir={"amltrain.configs": "configs"},
    package_data={"amltrain": ["py.typed", "report/templates/*"], "amltrain.configs": ["**/*.yaml"]},
)
