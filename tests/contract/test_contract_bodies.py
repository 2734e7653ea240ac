"""What `make deploy` sends, against RunPod's own description of its API: 300 desired states, each as a create and as the
change from another one. Skipped where the description is not at hand: tests/ops/runpod_openapi.py says where it is looked for."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from runpod_openapi import DESCRIPTION
from test_ops_plan import BODY, Console, bodies, resolved

from endpoint import plan as plans

SCHEMAS: dict[str, Any] = DESCRIPTION["components"]["schemas"]


def validator(name: str) -> jsonschema.Draft202012Validator:
    """The validator of one of its schemas; references lead into the others."""
    return jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": {"schemas": SCHEMAS}})


CREATE, UPDATE = validator("CreateEndpointRequest"), validator("UpdateEndpointRequest")


@settings(max_examples=300)
@given(desired=bodies(), actual=bodies())
def test_every_body_is_one_that_the_description_allows(desired: dict[str, Any], actual: dict[str, Any]) -> None:
    console = Console()
    desired, actual = resolved(desired, console), resolved(actual, console)
    CREATE.validate(plans.make(desired, None).body)
    plan = plans.make(desired, console.view(console.make(actual)))
    UPDATE.validate(plan.body)


def test_the_validator_can_fail() -> None:
    CREATE.validate(BODY)
    for wrong in ({**BODY, "templateld": "x"}, {**BODY, "workers": {"most": 3}}, {**BODY, "flashboot": True}):
        with pytest.raises(jsonschema.ValidationError):
            CREATE.validate(wrong)
    with pytest.raises(jsonschema.ValidationError):
        UPDATE.validate({"gpu": {"excludedTypes": ["NVIDIA L4"]}})  # an exclusion without its pools


def test_what_a_first_release_that_failed_is_set_to_is_allowed() -> None:
    UPDATE.validate({"workers": {"min": 0, "max": 0}})
