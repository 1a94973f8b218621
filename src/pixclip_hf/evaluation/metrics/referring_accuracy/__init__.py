"""Accuracy of referring expression comprehension."""
