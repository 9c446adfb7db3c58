"""The user's own category ids and names, and their place 0…K−1 inside the model."""

from dataclasses import dataclass

from lucidetr.errors import InputError


@dataclass(frozen=True)
class Categories:
    """Hold the K categories of a data set; position k in both tuples is label k inside the model.

    >>> cells = Categories(ids=(1, 7), names=("red", "white"))
    >>> len(cells), cells.ids[1], cells.names[1]
    (2, 7, 'white')
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]

    def __post_init__(self):
        if len(self.ids) != len(self.names):
            raise InputError(f"{len(self.ids)} category ids but {len(self.names)} names: give each id one name")
        for what, values in (("id", self.ids), ("name", self.names)):
            twice = [value for position, value in enumerate(values) if value in values[:position]]
            if twice:
                raise InputError(f"category {what} {twice[0]!r} is given twice: give each category its own")

    def __len__(self) -> int:
        return len(self.ids)
