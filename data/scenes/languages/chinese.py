"""Chinese captions: each noun has its measure word, and two of a thing are 两."""

from vlm.data.scenes.scene import Scene

# measure word, noun
NOUNS = {
    "circle": ("个", "圆形"),
    "square": ("个", "正方形"),
    "triangle": ("个", "三角形"),
    "star": ("颗", "星星"),
    "heart": ("颗", "爱心"),
    "cross": ("个", "十字"),
}
COLOURS = {
    "red": "红色",
    "orange": "橙色",
    "black": "黑色",
    "green": "绿色",
    "blue": "蓝色",
    "purple": "紫色",
    "pink": "粉色",
    "brown": "棕色",
}
SIZES = {"small": "小", "large": "大"}
GROUNDS = {
    "white": "白色背景",
    "grey": "灰色背景",
    "beige": "米色背景",
    "yellow": "黄色背景",
    "turquoise": "青绿色背景",
    "lavender": "淡紫色背景",
}
PLACES = {"left": "左侧", "right": "右侧", "top": "上方", "bottom": "下方", "centre": "中央"}
NUMBERS = {1: "一", 2: "两", 3: "三"}


def describe_in_chinese(scene: Scene) -> tuple[str, ...]:
    """Captions from those that say everything down to the bare name and a vague hint."""
    measure, noun = NOUNS[scene.shape]
    number = f"{NUMBERS[scene.count]}{measure}"
    colour, size = COLOURS[scene.colour], SIZES[scene.size]
    ground, place = GROUNDS[scene.background], PLACES[scene.position]
    return (
        f"{ground}的{place}有{number}{colour}的{size}{noun}",
        f"{number}{colour}的{size}{noun}位于{ground}的{place}",
        f"{place}有{number}{colour}{noun}",
        f"{ground}上有{number}{colour}{noun}",
        f"一张有{number}{colour}{noun}的图片",
        f"{number}{colour}{noun}",
        f"{colour}{noun}",
        f"{place}的{size}图形",
        f"{place}有图形",
    )
