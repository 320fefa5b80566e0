"""Known answers of noise version 1, made by an implementation that shares no code with the package.

Word i belongs to element `element_offset + i`; its decision is that of the logit
((i % 13) - 6) / 2. `packed` holds the decisions as bits, the lowest first.
"""

from __future__ import annotations

from typing import NamedTuple


class Vector(NamedTuple):
    seed: int
    sample: int
    tensor_id: int
    element_offset: int
    words: str
    decisions: str
    packed: str


# Known answer of Random123 for philox4x32-7, counter 0, key 0
PHILOX_ZERO = (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)

VECTORS = (
    Vector(
        seed=0,
        sample=0,
        tensor_id=0,
        element_offset=0,
        words="5f6fb709 0d893f64 4f121f81 4f730a48 983a586e b0cc9511 5850fbb9 9cf9acd8 "
        "3e272524 b291e38a 8cc79111 9fe71d3d 5f3486fa fd7af708 99a002f1 48dd172b "
        "173c7baa ea73e254 4d0b6ec7 2fea6c8c e3da05cc 7aba1556 5dd605b6 b51dfbc3",
        decisions="010000111111100010110111",
        packed="c21fed",
    ),
    Vector(
        seed=1,
        sample=0,
        tensor_id=0,
        element_offset=0,
        words="f422b57b 780e92b0 574dd0f2 5e9558ea 6b3257c3 820c5486 4de08b66 8771d665 "
        "e67ca09d 3eb31b42 e4521f8c d7d7618f 327fe82b bae1acf0 a4b2e225 c66e73c8 "
        "b5062a2e 0bb366ed c5e28593 2dbe8899 b3d8518b 3abb3738 ce7dbf67 10b1c574",
        decisions="000000110101100001010111",
        packed="c01aea",
    ),
    Vector(
        seed=-1,
        sample=0,
        tensor_id=0,
        element_offset=0,
        words="6b873f75 496796eb 8e557d63 05f40d29 5c0406d4 fd7db355 e2546814 f9c20dd8 "
        "ceaf1d50 793e03b8 09764c4d 94c06c50 871cde5f f1fd466d cdee1631 19a9d031 "
        "d5c2c678 cbcb78cc 099765c6 5da083f7 c8dfebd1 a6fd3954 d95ab510 4a05d9b8",
        decisions="000100000111100100110101",
        packed="089eac",
    ),
    Vector(
        seed=81985529216486895,
        sample=3,
        tensor_id=17,
        element_offset=2,
        words="a3d05359 adfbe597 2d96ce08 90b7aedb f32c1975 15514659 71c1f631 b2d2baab "
        "e23e717a ed93508b 36034837 a0199d4b d2d5f266 408026db c1540517 642c3f20 "
        "e9be488a 54066f62 6cf0116c 470227b8 49927c14 1a7c0908 a7da9d5e c271ed9c",
        decisions="000001100011100000011111",
        packed="601cf8",
    ),
    Vector(
        seed=-9223372036854775808,
        sample=4294967295,
        tensor_id=4294967295,
        element_offset=5,
        words="318e1ef8 d071e0e5 5b9c3c2f 1fd18496 aedf0805 bf946386 af86b5a1 17c59628 "
        "44222b20 820bf646 68b7889e 7b23a98d e031c368 2a4f24b3 2d0c24b6 5e2efb56 "
        "aa9691e4 515ae7b8 0d9da178 61279773 8c8168bd 48aeb4c3 6237e764 9ca4bf43",
        decisions="000100011111100000111111",
        packed="881ffc",
    ),
    Vector(
        seed=42,
        sample=7,
        tensor_id=1,
        element_offset=17179869178,
        words="b1b989e7 1cd25cca 33bf4a84 af18035b ef2f3ac3 941f362e 4b579a06 a3ebbbc5 "
        "ce61cfc5 e83deaaa 16d0ce73 8f4077b5 503e0d68 c2ef8b9d 89684845 dacd1ae9 "
        "7ac027c7 07aebcef 44dd5485 6cf36a36 f84ff14e 412f41a1 f38f3312 9c4f08e2",
        decisions="000000100011100001110101",
        packed="401cae",
    ),
    Vector(
        seed=42,
        sample=7,
        tensor_id=1,
        element_offset=1099511627779,
        words="0c3ca433 c68d221f e573aa0d a9850001 3b74a310 d998eb45 29a765e5 4e6edae2 "
        "af76b6ef 4cb8a5a3 1de71789 c7923bf4 a2874ac8 54b70391 5bb49736 0ab9a323 "
        "07be7d44 965ff8e2 dbd9f5bc 92e7b194 1b8e5634 0a127e20 59d050ac 24d4c4bd",
        decisions="000010111111100110001111",
        packed="d09ff1",
    ),
    Vector(
        seed=20200707,
        sample=1,
        tensor_id=2,
        element_offset=4095,
        words="ab5d463e 4821ff20 79e9e093 a5cbf403 3695e7c6 f099fecb 2b5414c1 989f316f "
        "71f8b879 7c20a11a 7b4cb2df 94a88dd7 44b329c5 11b265a8 c81c6de3 a2b8c3f5 "
        "338f0777 5c3e0ab7 d2c6c983 40a5f697 4b2dd6ed abb81c43 1f684b6c bb389c88",
        decisions="000010111111100000011111",
        packed="d01ff8",
    ),
    Vector(
        seed=-6,
        sample=2,
        tensor_id=5,
        element_offset=4611686018427387905,
        words="5d694325 93f2e9a6 4861a702 f338463a 53320a77 7134b5b0 265d0b66 686fe075 "
        "fcdccb2c d37af5fb be29cf62 bf2e1cce d77494c2 18fc946e db511334 495abc24 "
        "f6f068f4 d56eafd1 c91a3ef1 36494577 e25ee474 4962862e 849b7ff0 f5d1d8d5",
        decisions="000000110011100000010110",
        packed="c01c68",
    ),
)
