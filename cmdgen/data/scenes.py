"""Where things happen: the table of scenes."""

from cmdgen.data.layers import Layer, Scene
from cmdgen.data.paint import (
    backdrop,
    beams,
    clouds,
    discs,
    land,
    nebula,
    peaks,
    planet,
    skyline,
    stripes,
    trees,
    weeds,
)

OCEAN = Scene(
    "ocean",
    ("in the ocean", "in the sea", "in the water", "among the waves"),
    ("water", "open water"),
    backdrop("5bb4f0 0.44 d8f1fb 0.45 49b6cf 0.75 1f86bd", sun=(0.28, 0.16, 0.085, "fff6c8")),
    (
        Layer(clouds((0.33,), 0.8, 0.15, shade="bfe0f3"), 0.1, 0.36, speed=0.1, depth=0.05),
        Layer(
            land(
                0.485,
                ((0.66, 0.018, 0.1), (0.33, 0.006, 0.6)),
                "3fb0d2 0.25 1f7fbf",
                rim="a9e4ee",
                rim_width=0.022,
            ),
            0.44,
            speed=-0.08,
            depth=0.15,
        ),
        Layer(
            land(
                0.57,
                ((1.0, 0.028, 0.3), (0.5, 0.01, 0.1)),
                "2c9bd0 0.3 1467ae",
                rim="b9ebf5",
                rim_width=0.026,
            ),
            0.5,
            speed=0.1,
            depth=0.35,
        ),
        Layer(
            land(
                0.675,
                ((0.9, 0.034, 0.55), (0.45, 0.01, 0.2)),
                "2a98d4 0.25 0d559c",
                rim="e2f8ff",
                rim_width=0.03,
                opacity=0.68,
            ),
            0.58,
            speed=-0.12,
            depth=0.7,
            front=True,
        ),
        Layer(
            land(
                0.88,
                ((1.3, 0.03, 0.0), (0.65, 0.01, 0.4)),
                "1573b4 0.12 0a4384",
                rim="8fd3ee",
                rim_width=0.024,
            ),
            0.8,
            speed=-0.2,
            depth=1.0,
            front=True,
        ),
    ),
    centre=0.54,
)

SKY = Scene(
    "sky",
    ("in the sky", "in the air", "above the clouds", "up in the blue sky"),
    ("air",),
    backdrop("2f8fe6 0.6 8fcdf7 1 d9f0fd", sun=(-0.3, 0.16, 0.09, "fff7d1")),
    (
        Layer(clouds((0.34,), 1.0, 0.17, shade="b7dcf7"), 0.1, 0.4, speed=0.14, depth=0.2),
        Layer(clouds((0.72,), 1.0, 0.23, shade="b2d7f5"), 0.4, 0.8, speed=0.22, depth=0.4),
        Layer(clouds((1.04,), 0.8, 0.3, shade="8fc0ee"), 0.6, speed=0.32, depth=0.7, front=True),
    ),
    centre=0.53,
)

GRASS = Scene(
    "grass",
    ("on the grass", "in a meadow", "in a green field", "on a lawn"),
    ("land",),
    backdrop("58b3f3 0.6 d5effc", sun=(0.3, 0.15, 0.085, "fff6c4")),
    (
        Layer(clouds((0.27,), 0.9, 0.15), 0.05, 0.3, speed=0.16, depth=0.05),
        Layer(
            land(0.5, ((1.3, 0.05, 0.2), (0.65, 0.02, 0.7)), "8ccf5e 0.25 4fa54a"),
            0.4,
            speed=0.02,
            depth=0.25,
        ),
        Layer(
            land(
                0.66,
                ((2.0, 0.03, 0.5),),
                "9be05a 0.34 3f9a3a",
                rim="c4f07a",
                rim_width=0.02,
                patches=(0.5, "2f8637", 0.55),
            ),
            0.6,
            speed=0.05,
            depth=0.6,
        ),
        Layer(
            discs(0.24, (0.84, 0.97), (0.028, 0.045), "ffffff", "ffd84a", "ff8fb0", soft=0.35),
            0.78,
            speed=0.05,
            depth=0.8,
        ),
    ),
    ground=0.82,
    shadow="0c3a14",
)

DESERT = Scene(
    "desert",
    ("in the desert", "on the sand dunes", "among sand dunes"),
    ("land",),
    backdrop("f2a65a 0.55 fde7b5", sun=(-0.28, 0.2, 0.12, "fffbe0")),
    (
        Layer(
            land(0.47, ((1.0, 0.06, 0.1), (0.5, 0.02, 0.3)), "eeb873 0.3 d3894a"),
            0.36,
            speed=0.05,
            depth=0.2,
        ),
        Layer(
            land(0.58, ((1.3, 0.05, 0.6), (0.65, 0.012, 0.2)), "f6c983 0.3 c9793a", rim="fde3ac"),
            0.5,
            speed=0.09,
            depth=0.4,
        ),
        Layer(
            land(
                0.7,
                ((2.0, 0.03, 0.0),),
                "f8d28f 0.34 d58e48",
                rim="ffedc0",
                patches=(0.55, "b96f32", 0.5),
            ),
            0.64,
            speed=0.14,
            depth=0.6,
        ),
    ),
    ground=0.83,
    shadow="5a2a08",
)

SPACE = Scene(
    "space",
    ("in space", "in outer space", "among the stars", "in the galaxy"),
    ("void",),
    backdrop("0b0a2a 0.6 1c1245 1 0a1030"),
    (
        Layer(nebula((1.1, "5b35b8"), (1.3, "a8447f"), (1.2, "1f5aa8")), speed=0.12, depth=0.1),
        Layer(
            discs(0.21, (0.04, 0.96), (0.025, 0.045), "ffffff", "ffe9b0", "bfe4ff", soft=0.85),
            speed=0.2,
            depth=0.3,
        ),
        Layer(planet(0.2, 0.11, "ffcf8a", "b4532f"), 0.0, 0.5, speed=0.3, depth=0.35),
    ),
    centre=0.53,
)

SNOW = Scene(
    "snow",
    ("in the snow", "on a snowy hill", "in a snowy field"),
    ("land",),
    backdrop("8fb3d9 0.6 e3edf7"),
    (
        Layer(
            land(0.46, ((1.0, 0.07, 0.4), (0.5, 0.03, 0.1)), "c3d6ea 0.3 a4bfdc"),
            0.34,
            speed=0.02,
            depth=0.2,
        ),
        Layer(
            land(
                0.64,
                ((1.3, 0.04, 0.2), (0.65, 0.012, 0.5)),
                "ffffff 0.36 b9d0ea",
                rim="ffffff",
                patches=(0.6, "a3c0e2", 0.6),
            ),
            0.56,
            speed=0.04,
            depth=0.6,
        ),
        Layer(discs(0.11, (0.07, 0.93), (0.035, 0.055), "ffffff", soft=0.6), speed=-0.5, axis="y"),
    ),
    ground=0.83,
    shadow="1d3f72",
    shade=0.3,
)

UNDERWATER = Scene(
    "underwater",
    ("under water", "underwater", "at the bottom of the sea", "on a coral reef"),
    ("water",),
    backdrop("6fe0e6 0.5 1f9ec4 1 0b4f8a"),
    (
        Layer(beams(0.5, "e8ffff", 0.45, 0.35, 0.8), speed=0.15, depth=0.1),
        Layer(land(0.78, ((0.9, 0.05, 0.1),), "2f86a6 0.2 1d5f86"), 0.7, depth=0.2),
        Layer(weeds(0.3, 0.4, "3fb27f", "14604f"), 0.55, speed=0.05, depth=0.35),
        Layer(land(0.89, ((1.4, 0.02, 0.4),), "f0d9a0 0.11 b99a63", rim="fff0c4"), 0.84, depth=0.6),
        Layer(
            discs(0.3, (0.08, 0.92), (0.025, 0.05), "c9f6fb", "a6ecf5", soft=0.3),
            speed=0.6,
            axis="y",
        ),
        Layer(weeds(0.9, 0.28, "2f9d6c", "0d4a3e"), 0.7, speed=0.08, depth=0.9, front=True),
    ),
    centre=0.5,
)

RAIN = Scene(
    "rain",
    ("in the rain", "in a rainstorm", "on a rainy day"),
    ("land",),
    backdrop("54677d 0.6 a9bac6"),
    (
        Layer(
            clouds((0.24, 0.32), 0.55, 0.26, light="8797a6", shade="5b6b7c"),
            0.0,
            0.36,
            speed=0.25,
            depth=0.1,
        ),
        Layer(land(0.56, ((1.2, 0.05, 0.3),), "6b8a72 0.2 4c6b5a"), 0.45, depth=0.25),
        Layer(
            land(0.7, ((2.0, 0.02, 0.0),), "7f9d7a 0.3 47664f", patches=(0.45, "a9c6d6", 0.8)),
            0.65,
            depth=0.6,
        ),
        Layer(
            discs(0.07, (0.13, 0.87), (0.009, 0.014), "d7ecfa", soft=0.8, tall=7.0),
            speed=-2.0,
            axis="y",
            front=True,
        ),
    ),
    ground=0.84,
    shadow="1a2a30",
)

CITY = Scene(
    "city",
    ("in the city at night", "in a city at night", "downtown at night"),
    ("land",),
    backdrop("141a3c 0.75 5b4a86", sun=(0.28, 0.16, 0.06, "fdf6d8")),
    (
        Layer(skyline(0.82, 0.3, 0.5, "3a3a6b", "6b6aa6"), 0.25, 0.84, speed=0.05, depth=0.2),
        Layer(skyline(0.82, 0.42, 0.42, "23234a", "ffd873"), 0.35, 0.84, speed=0.08, depth=0.45),
        Layer(land(0.78, (), "6a6a80 0.05 3b3b4d", rim="9a9ab0"), 0.75, depth=0.9),
        Layer(
            discs(0.4, (0.94, 0.95), (0.1, 0.1), "f2e7b0", soft=0.2, tall=0.14),
            0.88,
            speed=0.08,
            depth=0.9,
        ),
    ),
    ground=0.86,
    shadow="08081a",
    shade=0.5,
)

BEACH = Scene(
    "beach",
    ("on the beach", "at the beach", "by the seaside"),
    ("land",),
    backdrop("46b6f0 0.5 d6f3fb", sun=(0.28, 0.15, 0.085, "fff3b8")),
    (
        Layer(clouds((0.26,), 0.9, 0.15), 0.05, 0.3, speed=0.14, depth=0.05),
        Layer(
            land(
                0.46,
                ((0.6, 0.008, 0.0),),
                "2aa7cf 0.2 4fd0d8",
                rim="c9f3f3",
                patches=(0.35, "8fe6e6", 0.6),
            ),
            0.42,
            speed=0.25,
            depth=0.2,
        ),
        Layer(
            land(0.64, ((1.0, 0.025, 0.5), (0.5, 0.01, 0.1)), "ffffff 0.03 f0d590 0.36 dcb268"),
            0.58,
            speed=0.12,
            depth=0.5,
        ),
        Layer(
            discs(0.35, (0.86, 0.96), (0.03, 0.045), "ff9a76", "fff4e0", "f6b6c8", soft=0.3),
            0.8,
            depth=0.8,
        ),
    ),
    ground=0.84,
    shadow="6b4a18",
)

STAGE = Scene(
    "stage",
    ("on stage", "on a stage", "in a theater"),
    ("land",),
    backdrop("4a0d18 1 7a1522"),
    (
        Layer(stripes(0.16, "c22a3a", "6f0f1e", (0.0, 0.72)), 0.0, 0.73, speed=0.04, depth=0.05),
        Layer(land(0.7, (), "d99a5b 0.3 8a5226", rim="ffd9a0", rim_width=0.015), 0.68),
        Layer(beams(0.7, "fff3c0", 0.55, 0.3, 1.1), speed=0.4, depth=0.05),
        Layer(beams(0.9, "ffc0f0", 0.35, -0.35, 1.1), speed=-0.5, depth=0.05),
    ),
    ground=0.86,
    shadow="2a0a05",
    shade=0.45,
)

FOREST = Scene(
    "forest",
    ("in the forest", "in the woods", "among the trees"),
    ("land",),
    backdrop("a8dcc0 0.7 e6f5d6"),
    (
        Layer(
            trees(0.68, 0.26, 0.55, "8cc79a", "5fa37c", round_crown=False), speed=0.02, depth=0.15
        ),
        Layer(
            trees(0.74, 0.36, 0.66, "3f9a5a", "1c5f40", round_crown=False), speed=0.04, depth=0.4
        ),
        Layer(
            land(0.72, ((2.0, 0.02, 0.1),), "7fbf5a 0.3 33702f", patches=(0.5, "2c6030", 0.6)),
            0.68,
            speed=0.05,
            depth=0.7,
        ),
        Layer(beams(0.8, "fffbd0", 0.4, 0.5, 0.9), speed=0.12, depth=0.1),
    ),
    ground=0.85,
    shadow="0b2a12",
)

MOUNTAINS = Scene(
    "mountains",
    ("in the mountains", "in front of snowy peaks", "in an alpine valley"),
    ("land",),
    backdrop("5aa3e8 0.6 e3f1fa"),
    (
        Layer(clouds((0.22,), 0.8, 0.14), 0.0, 0.25, speed=0.16, depth=0.05),
        Layer(
            peaks(0.72, 0.5, 0.52, "8ea4c4", "647a9e", "ffffff"), 0.15, 0.75, speed=0.03, depth=0.15
        ),
        Layer(peaks(0.74, 0.4, 0.26, "6f9a7c", "48735c"), 0.4, 0.76, speed=0.05, depth=0.35),
        Layer(
            land(0.72, ((2.0, 0.02, 0.3),), "a3d072 0.28 5a8f48", rim="cdeb9a"),
            0.68,
            speed=0.06,
            depth=0.6,
        ),
    ),
    ground=0.85,
    shadow="123018",
)

SUNSET = Scene(
    "sunset",
    ("at sunset", "at dusk", "in the evening sun"),
    ("land",),
    backdrop("4a2f7f 0.3 d9536f 0.55 ffb35a", sun=(0.0, 0.46, 0.15, "fff0b0")),
    (
        Layer(
            clouds((0.2, 0.34), 0.9, 0.16, light="ffb7a0", shade="b0527f", opacity=0.8),
            0.0,
            0.36,
            speed=0.14,
            depth=0.08,
        ),
        Layer(land(0.6, ((0.9, 0.06, 0.2),), "8a3f66 0.3 5a2a58"), 0.5, depth=0.2),
        Layer(
            land(0.72, ((1.4, 0.03, 0.7),), "5f2f55 0.28 2a1636", rim="ff9a5f"),
            0.66,
            speed=0.06,
            depth=0.6,
        ),
    ),
    ground=0.84,
    shadow="12041c",
    shade=0.5,
)

AUTUMN = Scene(
    "autumn",
    ("in an autumn park", "among falling leaves", "in the fall leaves"),
    ("land",),
    backdrop("9cc9e6 0.7 fdf0d2"),
    (
        Layer(trees(0.72, 0.4, 0.6, "f0a03c", "c2541f", round_crown=True), speed=0.03, depth=0.3),
        Layer(
            land(0.7, ((2.0, 0.02, 0.5),), "e3b04f 0.3 a0622a", patches=(0.4, "c8431f", 0.6)),
            0.66,
            speed=0.05,
            depth=0.6,
        ),
        Layer(
            discs(
                0.13, (0.06, 0.94), (0.03, 0.045), "e2571f", "f2a93b", "b8331c", soft=0.3, tall=0.7
            ),
            speed=-0.6,
            axis="y",
            front=True,
        ),
    ),
    ground=0.84,
    shadow="4a220a",
)

VOLCANO = Scene(
    "volcano",
    ("on a volcano", "next to a lake of lava", "in a volcanic land"),
    ("land",),
    backdrop("2a1020 0.6 8a2a1f"),
    (
        Layer(
            clouds((0.2, 0.3), 0.6, 0.24, light="5a3038", shade="331a24"),
            0.0,
            0.34,
            speed=0.2,
            depth=0.08,
        ),
        Layer(peaks(0.7, 0.7, 0.45, "4a2a30", "2c161e", "ff8a2a"), 0.2, 0.72, depth=0.2),
        Layer(
            land(
                0.62,
                ((0.7, 0.012, 0.2),),
                "ffd24a 0.2 f0461a",
                rim="fff0a0",
                patches=(0.4, "b8200f", 0.8),
            ),
            0.58,
            speed=0.25,
            depth=0.4,
        ),
        Layer(land(0.77, ((1.0, 0.02, 0.6),), "5a3a3c 0.2 251518", rim="b05a3a"), 0.73, depth=0.7),
        Layer(
            discs(0.16, (0.06, 0.94), (0.018, 0.032), "ffb03a", "ff6a2a", soft=0.8),
            speed=0.7,
            axis="y",
            front=True,
        ),
    ),
    ground=0.86,
    shade=0.5,
)

ROAD = Scene(
    "road",
    ("on the road", "on a country road", "along the highway"),
    ("land",),
    backdrop("6fc0f2 0.55 e4f4fb"),
    (
        Layer(clouds((0.24,), 0.8, 0.15), 0.04, 0.27, speed=0.12, depth=0.08),
        Layer(land(0.52, ((1.0, 0.05, 0.1),), "a6d27a 0.2 74ae58"), 0.44, speed=0.02, depth=0.25),
        Layer(
            trees(0.72, 0.5, 0.4, "5fb04f", "2f7a3c", round_crown=True),
            0.3,
            0.74,
            speed=0.05,
            depth=0.6,
        ),
        Layer(land(0.7, (), "8fc765 0.1 6aa84a"), 0.68, depth=0.7),
        Layer(land(0.76, (), "8a8d96 0.24 5e6069", rim="e8e8e8"), 0.74, depth=0.9),
        Layer(
            discs(0.45, (0.93, 0.935), (0.13, 0.13), "ffffff", soft=0.15, tall=0.14),
            0.88,
            speed=0.1,
            depth=0.9,
        ),
    ),
    ground=0.85,
    shadow="14161c",
)

ROOM = Scene(
    "room",
    ("in a room", "in the living room", "at home"),
    ("land",),
    backdrop("f7e3c3 1 eecb98"),
    (
        Layer(stripes(0.3, "fbeccf", "f0d5a6", (0.0, 0.72)), 0.0, 0.73, speed=0.01, depth=0.4),
        Layer(beams(1.2, "fffbe6", 0.75, 0.6, 1.2), 0.0, 0.72, speed=0.3, depth=0.1),
        Layer(
            land(0.7, (), "b9783f 0.3 8a5226", rim="fff3dc", patches=(0.8, "d79a5c", 0.6)),
            0.68,
            speed=0.01,
            depth=0.6,
        ),
    ),
    ground=0.86,
    shadow="3a1c06",
)

MOON = Scene(
    "moon",
    ("on the moon", "on a moon", "on a grey planet"),
    ("land", "void"),
    backdrop("07081c 0.7 1c2145"),
    (
        Layer(
            discs(0.2, (0.05, 0.55), (0.02, 0.035), "ffffff", "d8e4ff", soft=0.85),
            0.0,
            0.62,
            speed=0.15,
            depth=0.1,
        ),
        Layer(planet(0.24, 0.15, "6fc3ff", "124a9c"), 0.0, 0.45, speed=0.25, depth=0.15),
        Layer(land(0.64, ((1.2, 0.04, 0.2),), "a9adbd 0.2 7b8094"), 0.56, speed=0.02, depth=0.3),
        Layer(
            land(
                0.74,
                ((2.0, 0.02, 0.6),),
                "d3d6e0 0.26 8a8fa3",
                rim="f2f4fa",
                patches=(0.4, "767b91", 0.8),
            ),
            0.7,
            speed=0.04,
            depth=0.6,
        ),
    ),
    ground=0.86,
)


def _plain(name: str, light: str, shade: str, *, spot: str) -> Scene:
    """One colour, with large soft spots of light that drift by."""
    return Scene(
        f"plain {name}",
        (f"on a plain {name} background", f"on a {name} background", f"in front of a {name} wall"),
        ("land",),
        backdrop(f"{light} 0.7 {light} 1 {shade}"),
        (Layer(discs(0.7, (0.1, 0.9), (0.24, 0.4), spot, soft=1.0), speed=0.35, depth=0.15),),
        ground=0.84,
        shade=0.25,
    )


SCENES = {
    scene.name: scene
    for scene in (
        *(OCEAN, SKY, GRASS, DESERT, SPACE, SNOW, UNDERWATER, RAIN, CITY, BEACH, STAGE, FOREST),
        *(MOUNTAINS, SUNSET, AUTUMN, VOLCANO, ROAD, ROOM, MOON),
        _plain("blue", "5aa0f0", "2f6fc4", spot="8fc4ff"),
        _plain("pink", "ff9ac0", "e0648f", spot="ffc4dc"),
        _plain("yellow", "ffd95a", "e8ac2a", spot="fff0a8"),
        _plain("white", "f4f4f6", "cfd2da", spot="dfe6f2"),
    )
}
