"""Runs can be told apart by people with a colour-vision deficiency, in both themes, and without any colour."""

import itertools
import re

import numpy as np
import pytest

from opacus_ac.tensorboard.plugin import MAX_RUNS, STATIC

STYLE = (STATIC / "style.css").read_text()
CARDS = {"light": "#ffffff", "dark": "#303030"}
# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
SEEN = {
    "usual": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]]),
}  # fmt: skip
XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]])


def linear(colour):
    part = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    xyz = XYZ @ np.clip(rgb, 0, 1) / np.array([0.95047, 1.0, 1.08883])
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def colours(theme):
    prefix = r'\[data-theme="dark"\] ' if theme == "dark" else r"(?<!\] )"
    found = dict(re.findall(prefix + r"\.run-(\d) \{ --run: (#[0-9a-f]{6})", STYLE))
    return [found[str(slot)] for slot in range(MAX_RUNS)]


def test_lab_of_known_colours():
    np.testing.assert_allclose(lab(linear("#ffffff")), [100, 0, 0], atol=0.01)
    np.testing.assert_allclose(lab(linear("#ff0000")), [53.24, 80.09, 67.2], atol=0.05)


def least_distance(found, seen):
    points = [lab(SEEN[seen] @ linear(colour)) for colour in found]
    return min(np.linalg.norm(a - b) for a, b in itertools.combinations(points, 2))


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("theme", CARDS)
def test_all_colours_are_far_apart(theme, seen):
    assert least_distance(colours(theme), seen) > 25


def test_the_colours_before_were_not_apart_for_protanopia():
    """The measure finds what was wrong: two of the first four in the dark theme."""
    assert least_distance(["#6cb6ff", "#ff9d5c", "#4ade9c", "#e89bf5"], "protanopia") < 10


@pytest.mark.parametrize("theme", CARDS)
def test_all_colours_stand_out_from_the_card(theme):
    card = XYZ[1] @ linear(CARDS[theme])
    for colour in colours(theme):
        own = XYZ[1] @ linear(colour)
        assert (max(own, card) + 0.05) / (min(own, card) + 0.05) >= 4.5


def test_every_run_has_dashes_of_its_own():
    dashes = re.findall(r"\.line\.value\.run-(\d) \{ stroke-dasharray: ([\d ]+);", STYLE)
    assert [int(slot) for slot, _ in dashes] == list(range(1, MAX_RUNS))
    assert len({dash for _, dash in dashes}) == MAX_RUNS - 1
