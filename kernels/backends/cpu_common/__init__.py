"""What both CPU backends share."""
