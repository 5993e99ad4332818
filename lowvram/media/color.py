"""RGB to the YUV of video files and back.

Through libavfilter rather than PyAV's own `reformat`: there the rounding cannot be chosen in every version.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from av.filter import Graph
    from av.video.frame import VideoFrame

BT709 = 1
"""The code of BT.709 in H.264's tables of primaries, transfer functions and matrices."""
HDR: Mapping[int, str] = {16: "PQ", 18: "HLG"}
"""Transfer functions of high dynamic range, by their code in the same tables."""
LIMITED = 1
"""FFmpeg's code of the 16..235 range."""

EXACT = "flags=bicubic+accurate_rnd+bitexact+full_chroma_int+full_chroma_inp"


def to_yuv(width: int, height: int) -> Graph:
    """Full-range rgb24 frames of this size -> yuv420p, BT.709 matrix, limited range."""
    scale = f"in_range=pc:out_color_matrix=bt709:out_range=tv:{EXACT}"
    return _graph(width, height, "rgb24", scale, "yuv420p")


def to_rgb(width: int, height: int, pixels: str) -> Graph:
    """Frames of this size and pixel format -> full-range rgb24, by the matrix and range that each frame names."""
    return _graph(width, height, pixels, f"in_color_matrix=auto:in_range=auto:out_range=pc:{EXACT}", "rgb24")


def convert(graph: Graph, frame: VideoFrame) -> VideoFrame:
    """`frame` through `graph`. The time of the result is not to be used: graphs here know no clock."""
    graph.push(frame)
    return cast("VideoFrame", graph.pull())


def _graph(width: int, height: int, source: str, scale: str, target: str) -> Graph:
    from av.filter import Graph

    graph = Graph()
    chain = [
        graph.add("buffer", f"video_size={width}x{height}:pix_fmt={source}:time_base=1/1"),
        graph.add("scale", scale),
        graph.add("format", f"pix_fmts={target}"),
        graph.add("buffersink"),
    ]
    for here, there in pairwise(chain):
        here.link_to(there)
    graph.configure()
    return graph
