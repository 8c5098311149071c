"""The inputs of models: images and labels, directories of images, synthetic images, and calibration inputs."""
