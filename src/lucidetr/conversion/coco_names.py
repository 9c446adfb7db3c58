"""The 91 slots of the published models: the 80 categories of COCO under the ids 1…90 that its files use.

The published heads have one logit for each id 0…90, used or not, and one more for no object.
"""

from lucidetr.categories import Categories

COCO_SLOTS = 91


def coco_categories() -> Categories:
    """Return the 91 slots of a published COCO head: ids 0…90, `N/A <id>` where COCO has no such category.

    >>> categories = coco_categories()
    >>> len(categories), categories.names[17], categories.names[12]
    (91, 'cat', 'N/A 12')
    """
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    _background, *names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return slots(["N/A", *names])


def slots(names: list[str]) -> Categories:
    """Return categories 0…K−1 of these names; a name given more than once gets its id behind it.

    >>> slots(["N/A", "cat", "N/A"]).names
    ('N/A 0', 'cat', 'N/A 2')
    """
    unique = [f"{name} {slot}" if names.count(name) > 1 else name for slot, name in enumerate(names)]
    return Categories(ids=tuple(range(len(names))), names=tuple(unique))
