"""What a corpus reader yields: recordings it found, and what it could not use."""

from __future__ import annotations

from dataclasses import dataclass

SPLITS = ("train", "validation", "test")
NOT_STATED = "not stated"  # the licence of a recording that comes without one
CAPTION_TABLE = "caption table not used"  # the kind of reason that concerns a whole table of captions: said aloud, not only counted


@dataclass(frozen=True, slots=True)
class Recording:
    """One recording, or one stretch of it, as its corpus describes it. Nothing has been opened yet."""

    corpus: str
    recording_id: str  # unique in the corpus and fit for a clip id: letters, digits, "-" and "_"
    path: str  # absolute
    start: float = 0.0  # seconds
    seconds: float | None = None  # None = to the end
    captions: tuple[str, ...] = ()
    transcript: str = ""
    labels: tuple[str, ...] = ()  # display names
    split: str = "train"
    licence: str = ""
    precut: bool = False  # the file may hold just the stretch start … start + seconds, cut out beforehand
    origin: str = ""  # where the sound comes from, e.g. "youtube:<id>": equal in every corpus that has it
    content: str = ""  # hash of the file's bytes; "" until its header is read

    @property
    def clip_id(self) -> str:
        """Its id among all corpora; a window's number follows where it is cut into several clips."""
        return f"{self.corpus}-{self.recording_id}"

    def rejected(self, reason: str) -> Rejected:
        """The recording as a row of the rejected table."""
        return Rejected(self.corpus, self.path, self.clip_id, reason)


@dataclass(frozen=True, slots=True)
class Rejected:
    """Something a corpus lists or holds that cannot be used.

    `reason` is a kind that reports count by ("missing file"), with a detail behind a colon where there is one.
    """

    corpus: str
    path: str
    clip_id: str
    reason: str

    @property
    def kind(self) -> str:
        """The part of the reason that reports count by."""
        return self.reason.partition(":")[0]


Record = Recording | Rejected
