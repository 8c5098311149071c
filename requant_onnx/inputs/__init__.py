"""What models are fed: images and labels, folders of images, synthetic images, and the inputs of a calibration."""
