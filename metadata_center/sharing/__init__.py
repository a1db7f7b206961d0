"""Load and routing history shared between gateways: its content, its way, its rendezvous."""
