"""Reaching the Hugging Face hub, or not."""

from __future__ import annotations

import os
import urllib.error
import urllib.request

DEFAULT_ENDPOINT = "https://huggingface.co"
TIMEOUT_SECONDS = 5


def use_cache_without_network() -> None:
    """Makes the hub's libraries use their cache alone if the hub cannot be reached, instead of retrying for a minute.

    They read the switch when they are imported, so this comes first.
    """
    try:
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT), timeout=TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # an answer, whatever it says
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
