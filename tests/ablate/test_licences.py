# SPDX-License-Identifier: AGPL-3.0-or-later
"""The licence rules: names, public or private, what goes along."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import licences
from common.problems import Problem


@pytest.mark.parametrize(
    ("model", "licence", "name"),
    [
        ("Qwen/Qwen3-14B", "apache-2.0", "Qwen3-14B-ablated"),
        ("Qwen/Qwen3-14B", None, "Qwen3-14B-ablated"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama3.3", "Llama-3.3-70B-Instruct-ablated"),
        ("someone/hermes-llama", "llama3.1", "Llama-hermes-llama-ablated"),
        ("someone/llama-3.1-8b-chat", "llama3.1", "Llama-3.1-8b-chat-ablated"),
        ("meta-llama/Meta-Llama-3.1-8B", "llama3.1", "Llama-3.1-8B-ablated"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3", "Llama-3-8B-Instruct-ablated"),
        ("someone/Hermes-2", "llama3", "Llama-3-Hermes-2-ablated"),
        ("someone/Llama-32B", "llama3", "Llama-3-Llama-32B-ablated"),
        ("/data/models/my model/", "mit", "my-model-ablated"),
        ("./...", None, "model-ablated"),
        ("a/x--y..z", None, "x-y.z-ablated"),
    ],
)
def test_default_name(model: str, licence: str | None, name: str) -> None:
    assert licences.default_repo_name(model, licence) == name
    licences.check(licence, name, public=False)


@given(st.text(max_size=200), st.sampled_from([None, "apache-2.0", "llama3", "llama3.3", "llama4", "no such"]))
def test_every_default_name_is_one_that_the_hub_and_the_licence_take(model: str, licence: str | None) -> None:
    name = licences.default_repo_name(model, licence)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*[A-Za-z0-9]", name)
    assert "--" not in name
    assert ".." not in name
    assert len(f"{name}-nf4") <= licences.MAX_NAME
    licences.check(licence, f"owner/{name}", public=False)


@pytest.mark.parametrize("licence", ["llama3.1", "llama3.2", "llama3.3", "llama4", "LLAMA3.3", "llama-3.1"])
@pytest.mark.parametrize("public", [True, False])
def test_llama_names_begin_with_llama(licence: str, public: bool) -> None:
    for bad in ("open-synthesis", "my-Llama", "llama-3.3-70b"):
        with pytest.raises(Problem, match="begins with 'Llama'") as caught:
            licences.check(licence, f"me/{bad}", public)
        suggestion = str(caught.value).rpartition("REPO=")[2]
        assert suggestion.startswith("me/Llama")
        assert licences.check(licence, suggestion, public).notice == "Built with Llama"


def test_llama_3_has_its_own_prefix_and_notice() -> None:
    for bad in ("me/Llama-ablated", "me/Llama-31-8B", "me/Meta-Llama-3-8B"):
        with pytest.raises(Problem, match="Llama-3"):
            licences.check("llama3", bad, public=False)
    rules = licences.check("llama3", "me/Llama-3-8B-ablated", public=True)
    assert rules.notice == "Built with Meta Llama 3"
    assert "Meta Llama 3 is licensed under the Meta Llama 3 Community License" in rules.notice_file


def test_an_owner_called_llama_does_not_count() -> None:
    with pytest.raises(Problem, match="REPO=Llama/Llama-x"):
        licences.check("llama3.3", "Llama/x", public=False)


@pytest.mark.parametrize("licence", [None, "", "cc-by-nc-4.0", "qwen-research", "no such licence"])
def test_unknown_licences_stay_private(licence: str | None) -> None:
    assert not licences.check(licence, "me/x", public=False).public
    with pytest.raises(Problem, match="Leave PUBLIC unset"):
        licences.check(licence, "me/x", public=True)


@pytest.mark.parametrize("licence", ["apache-2.0", "mit", "Apache-2.0", "gemma", "qwen", "tongyi-qianwen", "llama2"])
def test_known_ones_may_be_public(licence: str) -> None:
    assert licences.check(licence, "me/x", public=True).public


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ({"license": "apache-2.0"}, "apache-2.0"),
        ({"license": "Llama3.3"}, "llama3.3"),
        ({"license": ["mit"]}, "mit"),
        ({"license": ["mit", "apache-2.0"]}, None),
        ({"license": "other", "license_name": "qwen"}, "qwen"),
        ({"license": "other"}, "other"),
        ({"license_name": "tongyi-qianwen"}, "tongyi-qianwen"),
        ({"license": {"a": 1}, "license_name": 3}, None),
        ({"license": "mit\x1b[31m"}, "mit"),
        # A card cannot call a licence of its own making apache-2.0 through its name.
        ({"license": "cc-by-nc-4.0", "license_name": "apache-2.0"}, "cc-by-nc-4.0"),
        ({}, None),
    ],
)
def test_what_a_card_declares(card: dict[str, object], licence: str | None) -> None:
    assert licences.declared(card) == licence


@pytest.mark.parametrize("link", ["LICENSE", "LICENSE.md", "https://example.org/a_b?c=d#e", "http://x"])
def test_links_that_are_kept(link: str) -> None:
    assert licences.declared_link({"license_link": f" {link}\n"}) == link


@pytest.mark.parametrize(
    "link",
    [None, 3, "", "x", "../LICENSE", "javascript:x", "https://a b", "https://a\u202eb c", "https://" + "a" * 600],
)
def test_links_that_are_not(link: object) -> None:
    assert licences.declared_link({"license_link": link}) is None


def test_files_that_go_along() -> None:
    along = [
        "LICENSE", "LICENSE.txt", "licence.md", "License", "LICENSE-MIT", "license_2.0.txt", "USE_POLICY.md", "use-policy.md",
        "Use Policy.pdf", "NOTICE", "Notice.txt",
    ]  # fmt: skip
    others = [
        "README.md", "sub/LICENSE", "LICENSES.zip", "LICENSE.zip", "LICENSE.py", "notice.bin", "licensed.txt", ".license",
        "LICENSE\n", "LICENSE.\u202etxt", "",
    ]  # fmt: skip
    assert licences.goes_along([*along, *others]) == along
