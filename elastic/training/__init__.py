"""What training needs of Lightning: the classifier, checkpoints, processes, the timeline."""
