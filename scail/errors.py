"""Every error that `scail` raises on purpose.

ScailError
├── InvalidInputError    what the caller gave cannot be rendered; trying again cannot help
├── CheckpointError      weights are missing, extra, misshapen or of another model
├── OutOfMemoryError     the device had too little memory; a cheaper placement may do
├── GenerationError      the network ran and what came out cannot be used
├── EncodeError          ffmpeg could not write the clip
└── Interrupted          the caller asked to stop between two denoising steps
"""


class ScailError(Exception):
    """Base of every error raised on purpose by `scail`."""


class InvalidInputError(ScailError):
    """What the caller gave cannot be rendered; the message says what came and what was expected."""


class CheckpointError(ScailError):
    """A checkpoint is incomplete, damaged or of another model; the message names the file or the key."""


class OutOfMemoryError(ScailError):
    """The device had too little memory for this clip under the placement in force."""


class GenerationError(ScailError):
    """The network ran to the end and produced something that cannot be used, such as non-finite latents."""


class EncodeError(ScailError):
    """ffmpeg ended with an error; the message carries the end of what it wrote to stderr."""


class Interrupted(ScailError):
    """Raised by an `on_step` callback to stop a render within one denoising step."""
