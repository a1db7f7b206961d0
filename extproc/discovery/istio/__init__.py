"""Endpoints from Istio: istiod asked by delta ADS for clusters and their endpoints."""
