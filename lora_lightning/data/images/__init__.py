"""Images: files, tables, transforms, segmentation."""
