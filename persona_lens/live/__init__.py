"""A reply's persona while it is generated: every token's projections, and safeguards that act on the next token.

`generate_watched` gives the texts of `generate` with the projections that the same passes computed; `stream_watched`
gives one reply token by token; a `Safeguard` raises an alert where a projection passes its threshold, and may switch an
intervention on for the rest of that reply (monitoring by projection: arXiv:2507.21509, section 3.3).
Knows nothing about judging, or about where vectors and thresholds come from.
"""

from persona_lens.live.replies import WatchedReply, WatchedToken, generate_watched, stream_watched
from persona_lens.live.safeguards import Alert, Safeguard

__all__ = ["Alert", "Safeguard", "WatchedReply", "WatchedToken", "generate_watched", "stream_watched"]
