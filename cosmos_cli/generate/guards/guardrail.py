"""Check prompts and videos with guards, which all fail closed.

The block list and the frame filter stand here; `aegis` and `faces` hold the other two guards.

Source: the rules of nvidia-cosmos/cosmos-predict1 at 4ed35fa, `auxiliary/guardrail`, and of the
libraries it calls there: better-profanity 0.7.0, and the noun lemmas of NLTK 3.9.1's WordNet.
"""

from __future__ import annotations

import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_cli import archives, console, files, paths
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.generate.guards.aegis import Aegis
from cosmos_cli.model import pretrained, weights
from cosmos_cli.recipe.keys import Recipe

# Characters that may replace a letter of a listed word.
LOOKALIKES = {
    "a": "a@*4", "e": "e*3", "i": "i*l1", "l": "l1", "o": "o*0@", "s": "s$5", "t": "t7",
    "u": "u*v", "v": "v*u",
}  # fmt: skip
WORD = re.compile(r"[a-z0-9@$*\"']+")
# Classes 1 to 6 of the frame filter. Class 0 is safe.
UNSAFE = ("sexual content", "violence", "drugs", "child abuse", "hate", "self-harm")
FRAMES_AT_ONCE = 16
SHOWN_CHARACTERS = 60
# WordNet's rules of detachment: the ending of a plural, and the ending of its possible singular.
PLURALS = (
    ("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"),
    ("shes", "sh"), ("men", "man"), ("ies", "y"),
)  # fmt: skip


def require_guards(r: Recipe) -> None:
    """Check that all guards are there, before GPU time is spent on a video that none can check.

    Raises:
        UserError: (ASSET) a guard is missing; (ENVIRONMENT) the package peft is missing.
    """
    for path in guard_files(r):
        with _reading(path):
            path.stat()
    if not importlib.util.find_spec("peft"):
        raise UserError(
            "the guardrail Aegis needs the package peft",
            code=ExitCode.ENVIRONMENT,
            fix='run `pip install -e ".[guardrails]"` in the clone',
        )


def block_list(r: Recipe) -> BlockList | None:
    """Return the block list of the recipe's model, or None, with a warning, if guards are off.

    Raises:
        UserError: (ASSET) it is missing or damaged; or as of `require_guards`.
    """
    if r.guardrails == "off":
        console.warn(
            "GUARDRAILS ARE OFF: neither prompts nor videos are checked, and every sidecar says so"
        )
        return None
    if not r.spec.embedded:
        require_guards(r)
    return BlockList(r.model_files.guardrail / "blocklist")


def aegis(r: Recipe, device: str, dtype: torch.dtype) -> Aegis:
    """Load the language model that judges prompts.

    Raises:
        UserError: (ASSET) it is missing or damaged.
    """
    guards = guard_files(r)
    with _reading(guards.aegis):
        return Aegis(guards.llama_guard, guards.aegis, device, dtype)


def has_all(r: Recipe) -> bool:
    """True if all guards are on. The embedded model has only the block list."""
    return r.guardrails == "on" and not r.spec.embedded


def guard_names(r: Recipe) -> list[str] | str:
    """Return the names of the active guards, for sidecars."""
    if r.guardrails == "off":
        return "off"
    more = ["Aegis", "frame filter", "face blur"] if has_all(r) else []
    return ["block list", *more]


class GuardFiles(NamedTuple):
    """Name the files of a released model's guards, without the block list."""

    llama_guard: Path
    aegis: Path
    siglip: Path
    classifier: Path
    faces: Path


def guard_files(r: Recipe) -> GuardFiles:
    """Return the paths of the guards' files."""
    root = Path(r.checkpoints_dir).absolute()
    guardrails = r.model_files.guardrail
    return GuardFiles(
        root / paths.LLAMA_GUARD_DIR,
        root / paths.AEGIS_DIR,
        root / paths.SIGLIP_DIR,
        guardrails / "video_content_safety_filter" / "safety_filter.pt",
        guardrails / "face_blur_filter" / "Resnet50_Final.pth",
    )


def blocked(guard: str, reason: str, prompt: str) -> UserError:
    """Return the error for a blocked prompt or video."""
    where = prompt if len(prompt) <= SHOWN_CHARACTERS else f"{prompt[:SHOWN_CHARACTERS]}..."
    return UserError(
        f"blocked by the {guard}: {reason}", code=ExitCode.BLOCKED, where=f"prompt {where!r}"
    )


class BlockList:
    """Find the words and phrases that no prompt may contain.

    It blocks three cases that the reference's libraries miss: a listed word in single quotes, a
    listed plural that is capitalised or precedes a full stop, and a listed word whose last letter,
    set apart, ends the text.
    """

    def __init__(self, folder: Path) -> None:
        """Read `folder`/{custom,whitelist,exact_match}/* and `folder`/nltk_data.

        Raises:
            UserError: (ASSET) a list is missing, empty or not text.
        """
        self.allowed = set(_entries(folder / "whitelist"))
        listed = [word for word in _entries(folder / "custom") if word not in self.allowed]
        self.phrases = _entries(folder / "exact_match")
        with _reading(folder):
            if not listed or not self.phrases:
                raise ValueError("a list is empty")
        self.words = _patterns(listed)
        self.joined = max([1, *(len(WORD.sub("", word)) for word in listed)])
        self.lemmas = Lemmas(folder / "nltk_data")

    def reason(self, prompt: str) -> str:
        """Return in a few words why the prompt is blocked, or "" if it is not."""
        text = re.sub(r"[^\x00-\x7f]+", " ", prompt).lower()
        singular = " ".join(map(self.lemmas.singular, re.findall(r"[a-z0-9@$*]+", text)))
        for version in (text, singular):
            if found := self._word_in(version):
                return f"it says {found!r}"
        if found := self._phrase_in(" ".join(text.split())):
            return f"it says {found!r}"
        return ""

    def _word_in(self, text: str) -> str:
        """Return the first listed word, even if split over adjacent words of the text, or ""."""
        spans = [match.span() for match in WORD.finditer(text)]
        for first in range(len(spans)):
            word = text[slice(*spans[first])]
            if self._is_listed(word) and word.strip("\"'@$*") not in self.allowed:
                return word
            for last in range(first + 1, min(first + self.joined, len(spans) - 1) + 1):
                parts = [text[slice(*span)] for span in spans[first : last + 1]]
                spread = text[spans[first][0] : spans[last][1]]
                if self._is_listed("".join(parts)) or self._is_listed(spread):
                    return spread
        return ""

    def _is_listed(self, word: str) -> bool:
        pattern = self.words.get(len(word))
        return pattern is not None and pattern.fullmatch(word) is not None

    def _phrase_in(self, text: str) -> str:
        """Return the first listed phrase that occurs in the text as whole words, or "".

        The reference also blocks similar phrases, by difflib's `ratio() >= (n - 0.4) / n` for n
        letters. One letter more or less gives 1 - 1 / (2n +- 1), which is lower. So only equal
        phrases match.
        """
        for phrase in self.phrases:
            if f" {phrase} " in f" {text} " or re.search(rf"\b{re.escape(phrase)}\b", text):
                return phrase
        return ""


class FrameFilter:
    """Classify each frame of a video as safe or unsafe, from its SigLIP features.

    `classifier` is the released `safety_filter.pt`, `siglip` a folder of
    google/siglip-so400m-patch14-384.

    Raises:
        UserError: (ASSET) a file is missing or damaged.
    """

    def __init__(self, classifier: Path, siglip: Path, device: str) -> None:
        from transformers import SiglipImageProcessorPil, SiglipVisionModel

        state = weights.load_tensors(classifier)
        state = {key.removeprefix("network.layers."): value for key, value in state.items()}
        with _reading(siglip):
            self.processor = pretrained.load_pretrained(SiglipImageProcessorPil, siglip)
            vision = pretrained.load_model(SiglipVisionModel, siglip, torch.float32)
        with _reading(classifier):
            self.classifier = _classifier(state).to(device).eval()
        self.vision = vision.to(device)
        self.device = device

    @torch.inference_mode()
    def reason(self, pixels_CTHW: Tensor) -> str:
        """Return in a few words why a uint8 video is blocked, or "" if it is not."""
        for first in range(0, pixels_CTHW.shape[1], FRAMES_AT_ONCE):
            frames = pixels_CTHW[:, first : first + FRAMES_AT_ONCE].permute(1, 2, 3, 0)
            inputs = self.processor(images=list(frames.numpy()), return_tensors="pt")
            features = self.vision(inputs.pixel_values.to(self.device)).pooler_output
            scores = self.classifier(F.normalize(features, dim=-1))
            for frame, score in enumerate(scores.cpu(), start=first):
                found = int(score.argmax())
                if not score.isfinite().all():
                    return f"frame {frame} cannot be judged"
                if found:
                    return f"frame {frame} may show {UNSAFE[found - 1]}"
        return ""


def _classifier(state: dict[str, Tensor]) -> nn.Sequential:
    """Return the classifier with its weights; the layer sizes are read from the weights.

    Raises:
        ValueError: the weights belong to another network.
    """
    try:
        sizes = [state[f"{i}.weight"].shape for i in (0, 3, 6)]
        (a, inputs), (b, _), (outputs, _) = sizes
    except (KeyError, ValueError) as error:
        raise ValueError("it is another classifier") from error
    if outputs != len(UNSAFE) + 1:
        raise ValueError(f"it has {outputs} classes, not {len(UNSAFE) + 1}")
    layers = nn.Sequential(
        *(nn.Linear(inputs, a), nn.BatchNorm1d(a), nn.ReLU()),
        *(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()),
        nn.Linear(b, outputs),
    )
    try:
        layers.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError("it is another classifier") from error
    return layers


class Lemmas:
    """Look up the nouns of WordNet, in its files as NLTK stores them."""

    def __init__(self, nltk_data: Path) -> None:
        self.nouns = {line.split(" ", 1)[0] for line in _wordnet(nltk_data, "index.noun")}
        self.irregular = {
            plural: singulars
            for plural, *singulars in map(str.split, _wordnet(nltk_data, "noun.exc"))
        }

    def singular(self, word: str) -> str:
        """Return the shortest noun that the word may be a form of, or the word itself."""
        forms = self.irregular.get(word)
        if forms is not None:
            return self._shortest([word, *forms]) or word
        forms = self._detached([word])
        found = self._shortest([word, *forms])
        while forms and not found:
            forms = self._detached(forms)
            found = self._shortest(forms)
        return found or word

    def _shortest(self, forms: list[str]) -> str:
        return min((form for form in forms if form in self.nouns), key=len, default="")

    @staticmethod
    def _detached(forms: list[str]) -> list[str]:
        return [
            form.removesuffix(ending) + instead
            for form in forms
            for ending, instead in PLURALS
            if form.endswith(ending)
        ]


def _patterns(words: Iterable[str]) -> dict[int, re.Pattern[str]]:
    """Return one pattern per word length.

    Every replacement of a letter is one character, so a match is as long as its word.
    """
    by_length: dict[int, list[str]] = defaultdict(list)
    for word in words:
        letters = (f"[{re.escape(LOOKALIKES.get(c, c))}]" for c in word)
        by_length[len(word)].append("".join(letters))
    return {length: re.compile("|".join(same)) for length, same in by_length.items()}


def _entries(folder: Path) -> list[str]:
    """Return the distinct lines of all files of a list, in lower case, with single spaces.

    Raises:
        UserError: (ASSET) the folder or a file cannot be read.
    """
    with _reading(folder):
        lists = sorted(path for path in folder.iterdir() if path.is_file())
        lines = [line for p in lists for line in files.read_text(p, files.WORDS).splitlines()]
    entries = [" ".join(line.lower().split()) for line in lines]
    return list(dict.fromkeys(filter(None, entries)))


def _wordnet(nltk_data: Path, name: str) -> list[str]:
    """Return the lines of a WordNet file, from its folder or the zip file that NLTK downloads.

    Raises:
        UserError: (ASSET) both are missing, or the file is damaged.
    """
    corpora = nltk_data / "corpora"
    with _reading(corpora / "wordnet" / name):
        if (corpora / "wordnet").is_dir():
            text = files.read_text(corpora / "wordnet" / name, files.WORDS)
        else:
            text = archives.read_member(corpora / "wordnet.zip", f"wordnet/{name}", files.WORDS)
    # Indented lines are the licence at the top.
    return [line for line in text.splitlines() if line and not line.startswith(" ")]


def _reading(path: Path) -> AbstractContextManager[None]:
    fix = "run `cosmos download RECIPE --for generate`, or add `--set guardrails=off`"
    return pretrained.reading_pretrained(path, "the guardrail cannot be read", fix)
