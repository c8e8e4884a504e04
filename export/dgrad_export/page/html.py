"""The page that shows a model's latent space: one HTML file that loads nothing else.

The page holds the facts of the model as JSON. Where it holds networks too, it computes by itself. Otherwise it asks the
server that it came from.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).with_name("page.html")
_DATA = "@DATA@"


def page(model: dict[str, Any], networks: dict[str, Any] | None = None) -> str:
    """The HTML.

    Args:
        model: what `model_facts` gives, with a `note` that stands below the page.
        networks: weights to compute with. None where the page asks the server.
    """
    data = json.dumps({"model": model, "networks": networks}, ensure_ascii=False, allow_nan=False)
    # A `<` in the data could end the element around it.
    return TEMPLATE.read_text(encoding="utf-8").replace(_DATA, data.replace("<", "\\u003c"))


def sealed(html: str) -> str:
    """The page as a file of its own, whose policy forbids every request."""
    first = '<meta charset="utf-8">'
    return html.replace(
        first, f'{first}\n<meta http-equiv="Content-Security-Policy" content="{policy(html, "none")}">', 1
    )


def policy(html: str, connect: str = "self") -> str:
    """A Content-Security-Policy for the page's script and style alone.

    Args:
        connect: where it may send requests: `self` for its own server, or `none`.
    """
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hash(html, 'script')}",
            f"style-src {_hash(html, 'style')}",
            "img-src data:",  # its icon
            f"connect-src '{connect}'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def _hash(html: str, tag: str) -> str:
    """The hash that the policy gives for the text of the page's one such element."""
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def model_facts(manifest: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The facts of an exported model that the page shows, from its manifest and the settings of its run."""
    latent, run = manifest["latent"], manifest.get("run", {})
    attributes, code = manifest.get("attributes"), run.get("code", {})
    # With labels the values of the one variable are the classes. Without, they have no names.
    named = settings.get("labels") and not attributes
    return {
        "dataset": settings.get("dataset"),
        "estimator": settings.get("estimator"),
        "latent": latent["spec"],
        "logits_shape": latent["shape"],
        "code_shape": latent["code_shape"],
        "values": latent["values"],
        "names": manifest.get("classes") if named else None,
        "attributes": attributes,
        "gaussian": manifest.get("gaussian", 0),
        "sampling": manifest.get("sampling", False),
        "image_shape": manifest["image_shape"],
        "rounds_at": manifest.get("preprocessing", {}).get("rounds_at"),
        "test_bound": run.get("test_bound"),
        "bits_per_dimension": run.get("test_bits_per_dimension"),
        "psnr": run.get("test_psnr"),
        "unit": run.get("unit"),
        "code": {name: code.get(name) for name in ("distinct_codes", "images", "values_in_use", "values")},
    }
