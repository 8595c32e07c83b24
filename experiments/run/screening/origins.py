"""Of which networks features and results were made: a record beside them, so that those of other networks are not taken for theirs."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping

from data_pipelines.exports import write_json

RECORD = "made_from.json"

Checksums = Mapping[str, str]
"""Stage -> checksum of its weights."""


def write_record(folder: pathlib.Path, networks: Checksums) -> None:
    """Writes that what is in the folder was made of these networks."""
    write_json(folder / RECORD, dict(networks))


def adopt(folder: pathlib.Path, made: str, networks: Checksums) -> None:
    """Trusts files that have no record, of an older version, to be of these networks; once, because they have a record from now on.
    made: the pattern of their names."""
    if not (folder / RECORD).exists() and any(folder.glob(made)):
        print(f"{folder / made}: of an older version, taken to be of the networks that are there", flush=True)
        write_record(folder, networks)


def changed(folder: pathlib.Path, networks: Checksums) -> list[str]:
    """The stages whose network is another than that which the folder's files were made of, or is new, or gone; all where there is no
    record."""
    file = folder / RECORD
    known = json.loads(file.read_text()) if file.exists() else {}
    return sorted(name for name in known.keys() | networks.keys() if known.get(name) != networks.get(name))
