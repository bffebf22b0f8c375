from __future__ import annotations

from tests.benchmarks import results

OURS = dict(about="eight rows", seconds=0.5, versions={"jax": "1"}, peak_gib=1.0, startup_seconds=9.0)
OURS |= dict(peer="torch dit", ratio=3.0, ratio_range=[2.0, 4.0], ratio_of_core_seconds=2.5, gflops=10.0)
OURS |= dict(roofline_seconds=[0.25, 0.125], share_of_roofline=0.5)
FOUND = dict(
  subject="generation",
  size="cpu",
  peer="torch",
  device="a card",
  machine=dict(processor="a processor", cores=2, memory_gib=8.0, load_before=0.0),
  ways={"dit": OURS, "alone": dict(OURS, ratio=None) | {"about": "no peer"}},
  peers={"torch dit": dict(about="their rows", seconds=1.5, versions={"torch": "2"}, peak_gib=2.0)},
  ceilings={"matmul": 40e9, "copy": 10e9},
  warm_seconds={"dit": 4.0, "alone": 4.0},
)
del FOUND["ways"]["alone"]["ratio"]


def test_a_subject_is_a_chapter_whose_figures_are_replaced_and_whose_words_stay():
  page = results.write("# Benchmark results\n", FOUND)
  assert "## Generation, cpu, beside torch" in page and "- a card; a processor, 2 cores" in page
  assert "| dit | 500 | 1500 | **3.00** (2.00 - 4.00) | 2.50 | 5.0 |" in page
  assert "250 ms at the matmul ceiling, 125 ms to move the state; 50% of the roofline" in page
  assert "first call after 9.0 s, 4.0 s from a warm cache" in page and "jax 1, torch 2" in page
  assert "no peer" not in page
  page = page.replace("beside torch\n", "beside torch\n\nWhy it is so.\n")
  again = results.write(page, FOUND | dict(machine=FOUND["machine"] | dict(cores=4)))
  assert again == page.replace("2 cores", "4 cores")
