"""How good a detector is: COCO's average precision and what it rests on."""
