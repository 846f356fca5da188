"""Reaching the Hugging Face hub, or not."""

from __future__ import annotations

import os
import urllib.error
import urllib.request

TIMEOUT_SECONDS = 5


def use_cache_without_network() -> None:
    """Makes the hub's libraries use their cache alone if the hub cannot be reached, instead of retrying for a minute.

    They read the switch when they are imported, so this comes first.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(endpoint, timeout=TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # an answer, whatever it says
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
