"""Pictures of a body that moves: through MuJoCo's renderer, or as a stick figure where no OpenGL is."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import ConfigError, MissingDependency
from moesaic.runs.folder import writing
from moesaic.skills.simulator import needed

if TYPE_CHECKING:
    import mujoco

logger = logging.getLogger(__name__)

Image = NDArray[np.uint8]
Floats = NDArray[np.float64]
WIDTH, HEIGHT = 640, 352
MARK = 0.045
"""Radius of a mark, m."""
RED = (214, 58, 47, 255)
METRE = 110.0
"""Pixels of a stick figure's metre."""


class Camera:
    """Follows a body from its right side.

    Args:
        model, base: whose pictures are taken, and the body that it follows.
        stick: draw lines between joints, whatever the machine has.
    """

    def __init__(self, model: mujoco.MjModel, base: str, *, stick: bool = False) -> None:
        self.model, self.base, self.stick, self.renderer = model, model.body(base).id, stick, None
        if not stick:
            self.renderer = _renderer(model)

    def frame(self, data: mujoco.MjData, marks: Floats, caption: str) -> Image:
        """(height, width, 3) of a body whose kinematics are worked out, with `marks` (m, 3) in red."""
        if self.renderer is None:
            return self._sticks(data, marks, caption)
        mujoco = needed()
        view = mujoco.MjvCamera()
        view.lookat[:] = [data.xpos[self.base][0] + 0.3, data.xpos[self.base][1], 0.75]
        view.distance, view.azimuth, view.elevation = 3.2, 90, -8
        self.renderer.update_scene(data, view)
        scene = self.renderer.scene
        for point in marks:
            mark = scene.geoms[scene.ngeom]
            mujoco.mjv_initGeom(
                mark, mujoco.mjtGeom.mjGEOM_SPHERE, np.full(3, MARK), point, np.eye(3).ravel(), np.array(RED) / 255
            )
            scene.ngeom += 1
        return _captioned(self.renderer.render(), caption)

    def _sticks(self, data: mujoco.MjData, marks: Floats, caption: str) -> Image:
        from PIL import Image as Pillow
        from PIL import ImageDraw

        model = self.model
        drawn = Pillow.new("RGB", (WIDTH, HEIGHT), (247, 246, 242))
        pen, middle = ImageDraw.Draw(drawn), data.xpos[self.base][0]

        def at(point: Sequence[float]) -> tuple[float, float]:
            return WIDTH / 2 + METRE * (point[0] - middle), HEIGHT - 40 - METRE * point[2]

        pen.line([(0, HEIGHT - 40), (WIDTH, HEIGHT - 40)], fill=(120, 120, 120), width=2)
        for metre in range(int(middle) - 4, int(middle) + 5):
            x, y = at((metre, 0, 0))
            pen.line([(x, y), (x, y + 6)], fill=(120, 120, 120))
        for geom in range(model.ngeom):
            kind, size, centre = int(model.geom_type[geom]), model.geom_size[geom], data.geom_xpos[geom]
            turn = data.geom_xmat[geom].reshape(3, 3)
            colour = tuple(int(255 * c) for c in model.geom_rgba[geom][:3])
            if kind == 3:  # a capsule, along its own z
                reach = turn[:, 2] * size[1]
                pen.line([at(centre - reach), at(centre + reach)], fill=colour, width=max(int(METRE * size[0]), 3))
            elif kind == 2:
                (x, y), far = at(centre), METRE * size[0]
                pen.ellipse([x - far, y - far, x + far, y + far], outline=colour, width=3)
            elif kind == 6:
                corners = [
                    centre + turn @ (np.array(s) * size) for s in ((1, 0, 1), (1, 0, -1), (-1, 0, -1), (-1, 0, 1))
                ]
                pen.polygon([at(corner) for corner in corners], outline=colour)
        for x, y in map(at, marks):
            far = METRE * MARK
            pen.ellipse([x - far, y - far, x + far, y + far], fill=RED[:3])
        return _captioned(np.asarray(drawn), caption)


def _captioned(taken: Image, caption: str) -> Image:
    from PIL import Image as Pillow
    from PIL import ImageDraw

    drawn = Pillow.fromarray(taken)
    ImageDraw.Draw(drawn).text((12, 10), caption, fill=(40, 40, 40), font_size=16)
    return np.asarray(drawn)


def _renderer(model: mujoco.MjModel) -> Any:
    """MuJoCo's renderer; None, and a warning, where there is no OpenGL."""
    mujoco = needed()
    model.vis.global_.offwidth, model.vis.global_.offheight = WIDTH, HEIGHT
    try:
        return mujoco.Renderer(model, HEIGHT, WIDTH)
    except Exception:  # whatever a machine without OpenGL makes of it
        logger.warning("no OpenGL works here (MUJOCO_GL=%s), and lines are drawn in its place", os.getenv("MUJOCO_GL"))
        return None


def write_film(frames: Iterable[Image], file: Path, fps: float) -> None:
    """An animated GIF, or an MP4, frame by frame, where imageio-ffmpeg is installed.

    Raises:
        ConfigError: the name ends in something else.
        MissingDependency: an MP4 without imageio-ffmpeg.
    """
    part = file.with_name(f".{file.stem}.part{file.suffix}")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write(frames, part, fps)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)


def _write(frames: Iterable[Image], file: Path, fps: float) -> None:
    if file.suffix == ".gif":
        from PIL import Image as Pillow

        shown = (Pillow.fromarray(frame).quantize(64) for frame in frames)
        next(shown).save(file, save_all=True, append_images=shown, duration=round(1000 / fps), loop=0)
    elif file.suffix == ".mp4":
        try:
            from imageio_ffmpeg import write_frames
        except ImportError:
            raise MissingDependency("imageio-ffmpeg", "skills") from None
        writer = write_frames(str(file), (WIDTH, HEIGHT), fps=fps)
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
    else:
        raise ConfigError(f"{file} must end in .gif or .mp4")
