"""Huge pages: hugetlb, splitting, collapsing."""
