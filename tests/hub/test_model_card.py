"""A model's page on the Hub names the licences of its official code."""

import json
import re
from pathlib import Path

import pytest

from amltrain.hub.model_card import HUB_LICENCES, build_model_card
from amltrain.hub.model_folder import CONFIG_FILE
from amltrain.models import list_models, model_info


@pytest.mark.parametrize("name", list_models())
def test_the_licence_is_one_that_the_hub_takes(name: str, tmp_path: Path) -> None:
    """One of the Hub's own, or "other" with a name in the Hub's characters and a link; in words, the whole of it."""
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"model": name}))
    card, licence = build_model_card(tmp_path, f"user/{name}", []), model_info(name).licence
    if licence in HUB_LICENCES:
        assert card.data.license == HUB_LICENCES[licence]
    else:
        assert card.data.license == "other"
        assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*[a-z0-9]", card.data.license_name)
        link = card.data.to_dict().get("license_link")
        assert link is None or re.fullmatch(r"https://(github\.com|huggingface\.co)/[\w./-]+", link)
    assert f"is under {licence}. " in card.text


def test_readme_says_the_same_licences(repository: Path) -> None:
    rows = re.findall(r"^\| `(\w+)`[^|]*\|[^|]*\| ([^|]*) \|", (repository / "README.md").read_text(), re.MULTILINE)
    assert len({name for name, _ in rows} & set(list_models())) >= 13
    for name, licence in [(name, licence) for name, licence in rows if name in list_models()]:
        assert licence == model_info(name).licence, name
