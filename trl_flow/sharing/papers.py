"""The papers behind a training run, for the citations in its model card."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """
    A paper to cite.

    Attributes:
        tag (`str`): the method's tag on the Hub, and its BibTeX key.
        name (`str`): what the method is called.
        arxiv (`str`): the arXiv number, which begins with year and month.
        title (`str`): the paper's title.
        authors (`str`): separated by `" and "`, as BibTeX wants it.
    """

    tag: str
    name: str
    arxiv: str
    title: str
    authors: str

    @property
    def bibtex(self) -> str:
        return (
            f"@article{{{self.tag},\n"
            f"    title   = {{{{{self.title}}}}},\n"
            f"    author  = {{{self.authors}}},\n"
            f"    year    = {{20{self.arxiv[:2]}}},\n"
            f"    journal = {{arXiv preprint arXiv:{self.arxiv}}},\n"
            f"}}"
        )


_PAPERS = (
    Paper(
        *("flow-grpo", "Flow-GRPO", "2505.05470"),
        "Flow-GRPO: Training Flow Matching Models via Online RL",
        "Jie Liu and Gongye Liu and Jiajun Liang and Yangguang Li and Jiaheng Liu and Xintao Wang and Pengfei Wan "
        "and Di Zhang and Wanli Ouyang",
    ),
    Paper(
        *("dance-grpo", "DanceGRPO", "2505.07818"),
        "DanceGRPO: Unleashing GRPO on Visual Generation",
        "Zeyue Xue and Jie Wu and Yu Gao and Fangyuan Kong and Lingting Zhu and Mengzhao Chen and Zhiheng Liu and "
        "Wei Liu and Qiushan Guo and Weilin Huang and others",
    ),
    Paper(
        *("flow-cps", "Flow-CPS", "2509.05952"),
        "Coefficients-Preserving Sampling for Reinforcement Learning with Flow Matching",
        "Feng Wang and Zihao Yu",
    ),
    Paper(
        *("mix-grpo", "MixGRPO", "2507.21802"),
        "MixGRPO: Unlocking Flow-based GRPO Efficiency with Mixed ODE-SDE",
        "Junzhe Li and Yutao Cui and Tao Huang and others",
    ),
    Paper(
        *("tempflow-grpo", "TempFlow-GRPO", "2508.04324"),
        "TempFlow-GRPO: When Timing Matters for GRPO in Flow Models",
        "Xiaoxuan He and Siming Fu and Yuke Zhao and Wanli Li and Jian Yang and Dacheng Yin and Fengyun Rao and "
        "Bo Zhang",
    ),
    Paper(
        *("grpo-guard", "GRPO-Guard", "2510.22319"),
        "GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping",
        "Jing Wang and Jiajun Liang and Jie Liu and Henglin Liu and Gongye Liu and Jun Zheng and Wanyuan Pang and "
        "Ao Ma and Zhenyu Xie and Xintao Wang and Meng Wang and Pengfei Wan and Xiaodan Liang",
    ),
    Paper(
        *("slas", "SLAS", "2605.10937"),
        "Power Reinforcement Post-Training of Text-to-Image Models with Super-Linear Advantage Shaping",
        "Haoyuan Sun and Jing Wang and Yuxin Song and Yu Lu and Bo Fang and Yifu Luo and Jun Yin and Pengyu Zeng "
        "and Miao Zhang and Tiantian Zhang and Xueqian Wang and Shijian Lu",
    ),
    Paper(
        *("vgpo", "VGPO", "2512.12387"),
        "Anchoring Values in Temporal and Group Dimensions for Flow Matching Model Alignment",
        "Yawen Shao and Jie Xiao and Kai Zhu and Yu Liu and Wei Zhai and Yang Cao and Zheng-Jun Zha",
    ),
)
PAPERS = {paper.tag: paper for paper in _PAPERS}


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
