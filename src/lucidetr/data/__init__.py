"""Images with boxes in: readers, generated scenes, transforms, batches."""
