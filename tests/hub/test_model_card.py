"""A model's page on the Hub names the licences of its official code."""

import json
import re
from pathlib import Path

import pytest

from amltrain.hub.model_card import HUB_LICENCES, _bibtex, build_model_card, has_paper
from amltrain.models import list_models, model_info
from amltrain.registry import METHODS
from amltrain.run_folder import CONFIG_FILE, TRAINING_FILE


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
    rows = re.findall(
        r"^\| `(\w+)`[^|]*\|[^|]*\| ([^|]*) \|", (repository / "docs/models.md").read_text(), re.MULTILINE
    )
    assert len({name for name, _ in rows} & set(list_models())) >= 13
    for name, licence in [(name, licence) for name, licence in rows if name in list_models()]:
        assert licence == model_info(name).licence, name


@pytest.mark.parametrize("method", METHODS.names())
@pytest.mark.parametrize("name", list_models())
def test_every_bibtex_key_is_there_once(name: str, method: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"model": name}))
    recipe = {"method": method, "data": {"datasets": ["refcoco"], "train_split": "train"}}
    training = {"recipe": recipe, "versions": {}, "hardware": "", "commit": ""}
    (tmp_path / TRAINING_FILE).write_text(json.dumps(training))
    [text] = re.findall(r"```bibtex\n(.*?)\n```", build_model_card(tmp_path, f"user/{name}", []).text, re.DOTALL)
    entries = re.findall(r"^@(?:misc|software)\{(\w+),\n((?:  \w+ = \{[^\n]+\},?\n)+)\}$", text, re.MULTILINE)
    keys = [key for key, _ in entries]
    assert len(keys) == len(set(keys)) == text.count("@")
    assert all(body.count("{") == body.count("}") and "none" not in body for _, body in entries)
    assert len(keys) == 1 + has_paper(model_info(name).paper) + has_paper(METHODS[method].details.paper)


def test_a_citation_has_title_venue_and_year() -> None:
    key, entry = _bibtex("CARIS: Context-Aware Referring Image Segmentation (ACM MM 2023)")
    assert key == "caris2023"
    assert "howpublished = {ACM MM 2023},\n  year = {2023}" in entry
    assert _bibtex("Mask Grounding for Referring Image Segmentation (CVPR 2024)")[0] == "maskgrounding2024"
    key, entry = _bibtex("MaskRIS: A Title, arXiv 2411.19067")
    assert (key, "year" in entry) == ("maskris", False)
    assert "title = {{MaskRIS: A Title}}" in entry
