"""The papers behind a training run, for the citations in its model card."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """
    A paper to cite.

    Attributes:
        name (`str`): what the method is called.
        tag (`str`): the method's tag on the Hub, and its BibTeX key.
        title (`str`): the paper's title.
        authors (`str`): separated by `" and "`, as BibTeX wants it.
        arxiv (`str`): the arXiv number.
        year (`int`): of the arXiv number.
    """

    name: str
    tag: str
    title: str
    authors: str
    arxiv: str
    year: int

    @property
    def bibtex(self) -> str:
        return (
            f"@article{{{self.tag},\n"
            f"    title   = {{{{{self.title}}}}},\n"
            f"    author  = {{{self.authors}}},\n"
            f"    year    = {{{self.year}}},\n"
            f"    journal = {{arXiv preprint arXiv:{self.arxiv}}},\n"
            f"}}"
        )


PAPERS = {
    paper.tag: paper
    for paper in (
        Paper(
            name="Flow-GRPO",
            tag="flow-grpo",
            title="Flow-GRPO: Training Flow Matching Models via Online RL",
            authors="Jie Liu and Gongye Liu and Jiajun Liang and Yangguang Li and Jiaheng Liu and Xintao Wang "
            "and Pengfei Wan and Di Zhang and Wanli Ouyang",
            arxiv="2505.05470",
            year=2025,
        ),
        Paper(
            name="DanceGRPO",
            tag="dance-grpo",
            title="DanceGRPO: Unleashing GRPO on Visual Generation",
            authors="Zeyue Xue and Jie Wu and Yu Gao and Fangyuan Kong and Lingting Zhu and Mengzhao Chen "
            "and Zhiheng Liu and Wei Liu and Qiushan Guo and Weilin Huang and others",
            arxiv="2505.07818",
            year=2025,
        ),
        Paper(
            name="Flow-CPS",
            tag="flow-cps",
            title="Coefficients-Preserving Sampling for Reinforcement Learning with Flow Matching",
            authors="Feng Wang and Zihao Yu",
            arxiv="2509.05952",
            year=2025,
        ),
        Paper(
            name="MixGRPO",
            tag="mix-grpo",
            title="MixGRPO: Unlocking Flow-based GRPO Efficiency with Mixed ODE-SDE",
            authors="Junzhe Li and Yutao Cui and Tao Huang and others",
            arxiv="2507.21802",
            year=2025,
        ),
        Paper(
            name="TempFlow-GRPO",
            tag="tempflow-grpo",
            title="TempFlow-GRPO: When Timing Matters for GRPO in Flow Models",
            authors="Xiaoxuan He and Siming Fu and Yuke Zhao and Wanli Li and Jian Yang and Dacheng Yin "
            "and Fengyun Rao and Bo Zhang",
            arxiv="2508.04324",
            year=2025,
        ),
        Paper(
            name="GRPO-Guard",
            tag="grpo-guard",
            title="GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping",
            authors="Jing Wang and Jiajun Liang and Jie Liu and Henglin Liu and Gongye Liu and Jun Zheng "
            "and Wanyuan Pang and Ao Ma and Zhenyu Xie and Xintao Wang and Meng Wang and Pengfei Wan "
            "and Xiaodan Liang",
            arxiv="2510.22319",
            year=2025,
        ),
        Paper(
            name="SLAS",
            tag="slas",
            title="Power Reinforcement Post-Training of Text-to-Image Models with Super-Linear Advantage Shaping",
            authors="Haoyuan Sun and Jing Wang and Yuxin Song and Yu Lu and Bo Fang and Yifu Luo and Jun Yin "
            "and Pengyu Zeng and Miao Zhang and Tiantian Zhang and Xueqian Wang and Shijian Lu",
            arxiv="2605.10937",
            year=2026,
        ),
        Paper(
            name="VGPO",
            tag="vgpo",
            title="Anchoring Values in Temporal and Group Dimensions for Flow Matching Model Alignment",
            authors="Yawen Shao and Jie Xiao and Kai Zhu and Yu Liu and Wei Zhai and Yang Cao and Zheng-Jun Zha",
            arxiv="2512.12387",
            year=2025,
        ),
    )
}


def papers_behind(settings: Mapping[str, object]) -> list[Paper]:
    """
    The papers whose methods a run used: Flow-GRPO always, the others by the fields of its config.

    Args:
        settings (`Mapping[str, object]`): values of `FlowGRPOConfig`'s fields by name; what is missing counts as off.
    """
    ratio, weighting = settings.get("importance_ratio"), settings.get("timestep_weighting")
    used = {
        "flow-grpo": True,
        "dance-grpo": settings.get("sde_type") == "dance",
        "flow-cps": settings.get("sde_type") == "cps",
        "mix-grpo": bool(settings.get("sde_window_size")),
        "tempflow-grpo": weighting == "temp",
        "grpo-guard": ratio in ("mean_revised", "ratio_norm")
        or weighting in ("inverse_dt", "beta_over_dt", "inverse_beta_dt"),
        "slas": bool(settings.get("advantage_power")),
        "vgpo": bool(settings.get("dense_rewards")),
    }
    return [PAPERS[tag] for tag, is_used in used.items() if is_used]
