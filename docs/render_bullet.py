"""Clips that look like KTH's people and BAIR's robot, rendered by pybullet: a folder that training reads.

    pip install pybullet                                    # 3.2.7; its motions' own licence is not stated
    python docs/render_bullet.py people clips --count 1000  # one grey person, from motion capture
    python docs/render_bullet.py robot clips --count 1000   # an arm that pushes things about on a table
    cmdgen train evdm -o runs/people --data clips

Clip number i follows from the seed and i. Existing clips stay, so that a stopped run goes on.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pybullet as bullet
import pybullet_data

from cmdgen.video.formats import Encoding
from cmdgen.video.write import Output, open_video

SIZE, FRAMES, FPS = 64, 20, 10
ROOT = Path(pybullet_data.getDataPath())
ACTIONS = {
    **{"walk": "walking", "run": "running", "punch": "punching", "jump": "jumping", "kick": "kicking"},
    **{"dance_a": "dancing", "dance_b": "dancing", "spin": "spinning", "crawl": "crawling"},
}
# in the order of the motions' rows; knees and elbows have one angle, the others a quaternion
JOINTS = (
    *("chest", "neck", "right_hip", "right_knee", "right_ankle", "right_shoulder", "right_elbow"),
    *("left_hip", "left_knee", "left_ankle", "left_shoulder", "left_elbow"),
)


def shoot(eye: list[float], target: list[float], up: list[float], fov: float) -> tuple[np.ndarray, np.ndarray]:
    """Return a picture, uint8 (H, W, 3), and where something is in it, bool (H, W)."""
    view = bullet.computeViewMatrix(eye, target, up)
    lens = bullet.computeProjectionMatrixFOV(fov, 1.0, 0.05, 30)
    shot = bullet.getCameraImage(SIZE, SIZE, view, lens, lightDirection=[1, 2, 2], renderer=bullet.ER_TINY_RENDERER)
    picture, what = (np.reshape(shot[i], (SIZE, SIZE, -1)) for i in (2, 4))
    return picture[..., :3].astype(np.uint8), what[..., 0] >= 0


def pose(body: int, joints: dict[str, int], rows: np.ndarray, share: float, drift: np.ndarray) -> None:
    """Put the humanoid between two rows of a motion."""
    before, after = rows

    def turn(at: int) -> tuple[float, ...]:
        # stored w, x, y, z
        ends = ([*row[at + 1 : at + 4], row[at]] for row in (before, after))
        return bullet.getQuaternionSlerp(*ends, share)

    place = (1 - share) * before[:3] + share * after[:3] + drift
    bullet.resetBasePositionAndOrientation(body, place.tolist(), turn(3))
    at = 7
    for name in JOINTS:
        if name.endswith(("knee", "elbow")):
            bullet.resetJointState(body, joints[name], float((1 - share) * before[at] + share * after[at]))
            at += 1
        else:
            bullet.resetJointStateMultiDof(body, joints[name], turn(at))
            at += 4


def render_person(rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Return one clip of a person before a plain ground, and its caption."""
    bullet.resetSimulation()
    body = bullet.loadURDF(str(ROOT / "humanoid/humanoid.urdf"), globalScaling=0.25, useFixedBase=True)
    joints = {bullet.getJointInfo(body, i)[1].decode(): i for i in range(bullet.getNumJoints(body))}
    action = str(rng.choice(list(ACTIONS)))
    rows = np.array(json.loads((ROOT / f"data/motions/humanoid3d_{action}.txt").read_text())["Frames"], float)
    step, rows = rows[0, 0], rows[:, 1:]
    length = step * (len(rows) - 1)
    # what is walked in one round goes on in the next
    stride = rows[-1, :3] - rows[0, :3] if action in ("walk", "run") else np.zeros(3)
    start, yaw, far = rng.uniform(0, length), rng.uniform(-0.6, 0.6), rng.uniform(3.2, 4.5)
    dark, ground, speed = rng.uniform(0.05, 0.35), rng.uniform(0.5, 0.9), rng.uniform(0.8, 1.3)
    for part in range(-1, bullet.getNumJoints(body)):
        bullet.changeVisualShape(body, part, rgbaColor=[dark, dark, dark, 1])
    frames, centre = [], None
    for number in range(FRAMES):
        rounds, time = divmod(start + speed * number / FPS, length)
        if not stride.any() and rounds % 2:
            # what does not end as it begins goes back
            time = length - time
        row = min(int(time / step), len(rows) - 2)
        pose(body, joints, rows[row : row + 2], time / step - row, rounds * stride)
        if centre is None:
            # halfway of what it will walk
            centre = rows[row, :3] + rounds * stride + stride * speed * FRAMES / FPS / length / 2
        eye = [centre[0] + far * np.sin(yaw), 1.0, centre[2] + far * np.cos(yaw)]
        picture, there = shoot(eye, [centre[0], 0.85, centre[2]], [0, 1, 0], 40)
        grey = np.where(there, picture.mean(axis=-1), 255 * ground).astype(np.uint8)
        frames.append(grey[..., None].repeat(3, axis=-1))
    return np.stack(frames), f"a person {ACTIONS[action]}"


def render_robot(rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Return one clip of an arm among six objects, and its caption."""
    bullet.resetSimulation()
    bullet.setGravity(0, 0, -9.8)
    bullet.loadURDF(str(ROOT / "plane.urdf"), [0, 0, -0.66])
    bullet.loadURDF(str(ROOT / "table/table.urdf"), [0.5, 0, -0.65])
    arm = bullet.loadURDF(str(ROOT / "kuka_iiwa/model.urdf"), useFixedBase=True)
    for number in range(6):
        name = f"{rng.integers(1000):03d}"
        place = [rng.uniform(0.4, 0.75), rng.uniform(-0.3, 0.3), 0.05 + 0.05 * number]
        turned = bullet.getQuaternionFromEuler(rng.uniform(0, 2 * np.pi, 3).tolist())
        thing = bullet.loadURDF(str(ROOT / f"random_urdfs/{name}/{name}.urdf"), place, turned, globalScaling=1.3)
        bullet.changeVisualShape(thing, -1, rgbaColor=[*rng.uniform(0.1, 1, 3), 1])
    for joint, angle in enumerate((0, 0.6, 0, -1.2, 0, 1.2, 0)):
        bullet.resetJointState(arm, joint, angle)
    for _ in range(120):
        bullet.stepSimulation()
    frames, goal, speed = [], np.array([0.55, 0, 0.08]), np.zeros(2)
    for number in range(FRAMES):
        if number % 5 == 0:
            speed = rng.normal(0, 0.045, 2)
        goal[:2] = np.clip(goal[:2] + speed, [0.38, -0.32], [0.78, 0.32])
        down = bullet.getQuaternionFromEuler([0, np.pi, 0])
        angles = bullet.calculateInverseKinematics(arm, 6, goal.tolist(), down)
        for joint, angle in enumerate(angles):
            bullet.setJointMotorControl2(arm, joint, bullet.POSITION_CONTROL, angle, force=300, maxVelocity=3)
        for _ in range(24):
            bullet.stepSimulation()
        frames.append(shoot([1.35, 0, 0.75], [0.5, 0, 0], [0, 0, 1], 45)[0])
    return np.stack(frames), "a robot arm pushing objects"


def main() -> None:
    """Render the clips that are not there yet; captions go beside them."""
    kinds: dict[str, Callable[[np.random.Generator], tuple[np.ndarray, str]]]
    kinds = {"people": render_person, "robot": render_robot}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    bullet.connect(bullet.DIRECT)
    for index in range(options.count):
        file = options.folder / f"{options.kind}-{index:05d}.mp4"
        if file.with_suffix(".txt").exists():
            continue
        frames, caption = kinds[options.kind](np.random.default_rng((options.seed, index)))
        with open_video(Output(file, (SIZE, SIZE), FPS, None, Encoding("mp4", crf=12), overwrite=True)) as write:
            write(frames)
        file.with_suffix(".txt").write_text(f"{caption}\n")


if __name__ == "__main__":
    main()
